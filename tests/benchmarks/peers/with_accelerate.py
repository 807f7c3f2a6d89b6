"""The script by hand, adapted to Hugging Face Accelerate as its documentation shows."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm import tqdm
from workload import CLIP_NORM, endless, open_workload


@torch.no_grad()
def evaluate(accelerator, model, loader):
    model.eval()
    losses = []
    for batch in loader:
        size = len(next(iter(batch.values())))
        losses.append(accelerator.gather_for_metrics(model(**batch)["loss"].repeat(size)))
    model.train()
    return torch.cat(losses).mean().item()


def main():
    workload, folder, model, train, validation = open_workload()
    optimizer, scheduler = workload.make_optimizer(model)
    accelerator = Accelerator(log_with="tensorboard", project_dir=folder)
    accelerator.init_trackers("logs")
    model, optimizer, scheduler, loader, validation_loader = accelerator.prepare(
        model,
        optimizer,
        scheduler,
        DataLoader(train, workload.batch_size, shuffle=True, drop_last=True),
        DataLoader(validation, workload.batch_size),
    )
    batches = endless(loader)
    model.train()
    bar = tqdm(range(1, workload.steps + 1))
    for step in bar:
        loss = model(**next(batches))["loss"]
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % workload.log_every == 0:
            bar.set_postfix(loss=loss.item())
            rate = scheduler.get_last_lr()[0]
            accelerator.log({"train/loss": loss.item(), "train/grad_norm": norm.item(), "train/lr": rate}, step=step)
        if step % workload.every == 0:
            eval_loss = evaluate(accelerator, model, validation_loader)
            accelerator.log({"eval/loss": eval_loss}, step=step)
            accelerator.save_state(folder / f"step_{step}")
    accelerator.end_training()
    print(f"eval/loss {eval_loss}")


if __name__ == "__main__":
    main()
