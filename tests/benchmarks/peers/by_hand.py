"""The script that a user would write with torch alone, at torch's defaults."""

import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from workload import CLIP_NORM, endless, open_workload


@torch.no_grad()
def evaluate(model, loader):
    model.eval()
    total = 0.0
    for batch in loader:
        total += model(**batch)["loss"].item() * len(next(iter(batch.values())))
    model.train()
    return total / len(loader.dataset)


def main():
    workload, folder, model, train, validation = open_workload()
    optimizer, scheduler = workload.make_optimizer(model)
    batches = endless(DataLoader(train, workload.batch_size, shuffle=True, drop_last=True))
    validation_loader = DataLoader(validation, workload.batch_size)
    writer = SummaryWriter(folder)
    model.train()
    bar = tqdm(range(1, workload.steps + 1))
    for step in bar:
        loss = model(**next(batches))["loss"]
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % workload.log_every == 0:
            bar.set_postfix(loss=loss.item())
            writer.add_scalar("train/loss", loss.item(), step)
            writer.add_scalar("train/grad_norm", norm.item(), step)
            writer.add_scalar("train/lr", scheduler.get_last_lr()[0], step)
        if step % workload.every == 0:
            eval_loss = evaluate(model, validation_loader)
            writer.add_scalar("eval/loss", eval_loss, step)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"scheduler": scheduler.state_dict(), "step": step}, folder / f"step_{step}.pt")
    writer.close()
    print(f"eval/loss {eval_loss}")


if __name__ == "__main__":
    main()
