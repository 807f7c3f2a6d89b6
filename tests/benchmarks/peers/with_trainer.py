"""The same training with Hugging Face's Trainer."""

import os

from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments
from workload import CLIP_NORM, open_workload


def main():
    workload, folder, model, train, validation = open_workload()
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=workload.steps,
        per_device_train_batch_size=workload.batch_size,
        per_device_eval_batch_size=workload.batch_size,
        max_grad_norm=CLIP_NORM,
        logging_steps=workload.log_every,
        eval_strategy="steps",
        eval_steps=workload.every,
        save_strategy="steps",
        save_steps=workload.every,
        report_to="tensorboard",
        dataloader_drop_last=True,
        dataloader_pin_memory=False,  # on the CPU it has no effect but a warning
        remove_unused_columns=False,
        prediction_loss_only=True,
        label_names=list(train[0])[-1:],  # what the loss needs: label or window
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=default_collate,
        train_dataset=train,
        eval_dataset=validation,
        optimizers=workload.make_optimizer(model),
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    print(f"eval/loss {losses[-1]}")


if __name__ == "__main__":
    main()
