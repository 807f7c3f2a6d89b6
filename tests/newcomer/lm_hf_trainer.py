"""The language model of lm.yaml with Hugging Face's Trainer: python lm_hf_trainer.py [CHECKPOINT]."""

import sys

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    ByT5Tokenizer,
    DataCollatorForLanguageModeling,
    GPT2Config,
    Trainer,
    TrainingArguments,
)


def stream(path, tokenizer):
    lines = load_dataset("text", data_files=path, split="train", streaming=True)
    return lines.map(tokenizer, input_columns=["text"], remove_columns=["text"])


if __name__ == "__main__":
    tokenizer = ByT5Tokenizer()
    config = GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=1)
    arguments = TrainingArguments(
        output_dir="outputs",
        max_steps=40,
        per_device_train_batch_size=8,
        learning_rate=3e-4,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        eval_strategy="steps",
        eval_steps=20,
        save_steps=10,
        logging_steps=5,
        report_to=["tensorboard"],
    )
    trainer = Trainer(
        AutoModelForCausalLM.from_config(config),
        arguments,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=stream("/usr/share/common-licenses/GPL-3", tokenizer),
        eval_dataset=stream("/usr/share/common-licenses/BSD", tokenizer),
    )
    trainer.train(resume_from_checkpoint=sys.argv[1] if len(sys.argv) > 1 else None)
    trainer.save_model("outputs/export")
