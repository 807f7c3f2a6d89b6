"""Microseconds per step above a bare PyTorch loop: `python tests/benchmarks/loop.py`.

The model is an MLP of about 150 us per step, trained with SGD. A bare loop logs nothing. All other contenders log at
least 4 scalars per step to TensorBoard and show a progress bar. They run in turns. The result is the median over rounds
of the difference to the bare loop of the same round.
"""

import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

from runner.control.commands import CommandQueue
from runner.control.handlers import COMMANDS
from runner.engines import Engine, Engines
from runner.engines.dynamo import step_without_dynamo
from runner.engines.optim.fused import use_fused_kernels
from runner.tracking.console import Console
from runner.tracking.tracker import TrackerThread
from runner.utils.sampler import OrderedSampler
from runner.utils.sampler.batches import Batches
from runner.utils.train import Loop

STEPS, ROUNDS, WIDTH, BATCH = 3000, 5, 64, 32
NUM_GROUPS, GROUPS_STEPS = 2000, 100


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(16, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1)
        )

    def forward(self, x, y):
        return ((self.layers(x) - y) ** 2).mean()


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Cycle:
    """The same batches in memory for all contenders."""

    weight = 1.0

    def __init__(self, batches):
        self.batches, self.num_samples_total = batches, 0

    def __next__(self):
        batch = self.batches[self.num_samples_total // BATCH % len(self.batches)]
        self.num_samples_total += BATCH
        return batch

    def position(self):
        return self.num_samples_total

    def seek(self, position):
        self.num_samples_total = position


class ManyGroups(nn.Module):
    """Each of its parameters has an optimizer group of its own."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ParameterList([torch.randn(WIDTH // 4) for _ in range(NUM_GROUPS)])

    def forward(self, x, y):
        return ((x @ torch.stack(list(self.parts)).sum(0) - y[:, 0]) ** 2).mean()


def make_model(optimizer=torch.optim.SGD):
    torch.manual_seed(0)
    model = Model()
    return model, optimizer(model.parameters(), lr=1e-3)


def make_many_groups():
    torch.manual_seed(0)
    model = ManyGroups()
    groups = [{"params": [part], "lr": 1e-4 / (1 + index)} for index, part in enumerate(model.parts)]
    return model, torch.optim.SGD(groups, lr=1e-4)


def run_bare(batches, folder, make=make_model, steps=STEPS):
    model, optimizer = make()
    for step in range(steps):
        x, y = batches[step % len(batches)]
        optimizer.zero_grad()
        model(x, y).backward()
        optimizer.step()


def run_ours(batches, folder, stream=None, make=make_model, steps=STEPS, log_every=1):
    model, optimizer = make()
    use_fused_kernels(optimizer, model)  # as `build` does
    step_without_dynamo(optimizer)
    engines, tracker = Engines(model=Engine(model, optimizer, on_nonfinite="stop")), TrackerThread(folder)
    console = Console(steps, stream=Terminal())
    queue = CommandQueue(COMMANDS, lambda text: None)
    loop = Loop(
        engines, stream or Cycle(batches), steps=steps, log_every=log_every, log=tracker.log, queue=queue,
        display=console,
    )  # fmt: skip
    loop.run()
    console.close()
    tracker.close()
    assert len((Path(folder) / "metrics.jsonl").read_text().splitlines()) == steps // log_every


class Samples(torch.utils.data.Dataset):
    """A dataset of the user's own, which returns one sample at a time."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


def make_dataset(batches, kind):
    return kind(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


def run_ours_with_batches(batches, folder, kind=torch.utils.data.TensorDataset, num_workers=0):
    dataset = make_dataset(batches, kind)
    sampler = OrderedSampler(len(dataset))
    stream = Batches(dataset, sampler, BATCH, num_workers=num_workers, seed_samples=False)
    with contextlib.closing(stream):
        run_ours(batches, folder, stream)


def run_bare_with_loader(batches, folder, kind=torch.utils.data.TensorDataset, num_workers=0):
    dataset = make_dataset(batches, kind)
    loader = torch.utils.data.DataLoader(dataset, BATCH, num_workers=num_workers, persistent_workers=num_workers > 0)
    model, optimizer = make_model()
    step = 0
    while step < STEPS:
        for x, y in loader:
            optimizer.zero_grad()
            model(x, y).backward()
            optimizer.step()
            step += 1
            if step == STEPS:
                break


def run_by_hand(batches, folder):
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

    model, optimizer = make_model()
    writer, last = SummaryWriter(folder), time.perf_counter()
    with open(Path(folder) / "metrics.jsonl", "w") as lines, tqdm(total=STEPS, file=Terminal()) as bar:
        for step in range(STEPS):
            x, y = batches[step % len(batches)]
            optimizer.zero_grad()
            loss = model(x, y)
            loss.backward()
            optimizer.step()
            now = time.perf_counter()
            seconds, last = now - last, now
            values = {"loss": loss.item(), "lr": 1e-3, "step_time_s": seconds, "samples_per_s": BATCH / seconds}
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            lines.write(json.dumps({"step": step} | values) + "\n")
            bar.set_postfix(loss=values["loss"])
            bar.update()
    writer.close()


def run_accelerate(batches, folder):
    from accelerate import Accelerator
    from tqdm import tqdm

    accelerator = Accelerator(log_with="tensorboard", project_dir=folder, cpu=True)
    accelerator.init_trackers("run")
    model, optimizer = accelerator.prepare(*make_model())
    last = time.perf_counter()
    with tqdm(total=STEPS, file=Terminal()) as bar:
        for step in range(STEPS):
            x, y = batches[step % len(batches)]
            optimizer.zero_grad()
            loss = model(x, y)
            accelerator.backward(loss)
            optimizer.step()
            now = time.perf_counter()
            seconds, last = now - last, now
            values = {"loss": loss.item(), "lr": 1e-3, "step_time_s": seconds, "samples_per_s": BATCH / seconds}
            accelerator.log(values, step=step)
            bar.update()
    accelerator.end_training()


def run_lightning(batches, folder):
    import lightning
    from lightning.pytorch.loggers import TensorBoardLogger

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.last = make_model()[0], time.perf_counter()

        def training_step(self, batch, index):
            loss = self.model(*batch)
            now = time.perf_counter()
            seconds, self.last = now - self.last, now
            values = {"loss": loss, "lr": 1e-3, "step_time_s": seconds, "samples_per_s": BATCH / seconds}
            self.log_dict(values, prog_bar=True, batch_size=BATCH)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=STEPS, max_epochs=-1, log_every_n_steps=1, logger=TensorBoardLogger(folder),
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader([batches[step % len(batches)] for step in range(STEPS)], batch_size=None)
    trainer.fit(Module(), loader)


make_adamw = partial(make_model, torch.optim.AdamW)  # both at their defaults: the runner uses the fused kernel
MANY_GROUPS = {"make": make_many_groups, "steps": GROUPS_STEPS}

CONTENDERS = {
    "bare loop": (run_bare, "bare loop"),
    "runner": (run_ours, "bare loop"),
    "AdamW: bare loop": (partial(run_bare, make=make_adamw), "AdamW: bare loop"),
    "AdamW: runner": (partial(run_ours, make=make_adamw), "AdamW: bare loop"),
    "2000 groups: bare loop": (partial(run_bare, **MANY_GROUPS), "2000 groups: bare loop"),
    "2000 groups: runner": (partial(run_ours, **MANY_GROUPS, log_every=10), "2000 groups: bare loop"),
    "bare loop + DataLoader": (run_bare_with_loader, "bare loop + DataLoader"),
    "runner + its Batches": (run_ours_with_batches, "bare loop + DataLoader"),
    "DataLoader, samples": (partial(run_bare_with_loader, kind=Samples), "DataLoader, samples"),
    "Batches, samples": (partial(run_ours_with_batches, kind=Samples), "DataLoader, samples"),
    "DataLoader, 2 workers": (partial(run_bare_with_loader, num_workers=2), "DataLoader, 2 workers"),
    "Batches, 2 workers": (partial(run_ours_with_batches, num_workers=2), "DataLoader, 2 workers"),
    "SummaryWriter + tqdm by hand": (run_by_hand, "bare loop"),
    "Accelerate": (run_accelerate, "bare loop"),
    "Lightning": (run_lightning, "bare loop"),
}


def measure(run, batches):
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        run(batches, folder)
        steps = getattr(run, "keywords", {}).get("steps", STEPS)
        return (time.perf_counter() - began) / steps * 1e6


def main():
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(BATCH, 16, generator=generator), torch.randn(BATCH, 1, generator=generator)) for _ in range(64)
    ]
    figures = {name: [] for name in CONTENDERS}
    for round_number in range(ROUNDS + 1):  # the first is a warm-up
        for name, (run, _) in CONTENDERS.items():
            if figures[name] is None:
                continue
            try:
                found = measure(run, batches)
            except ImportError as error:
                print(f'{name}: not measured ({error}); pip install "exact-runner[benchmarks]"', file=sys.stderr)
                figures[name] = None
                continue
            if round_number:
                figures[name].append(found)
    print(f"{STEPS} steps, median of {ROUNDS} rounds, torch {torch.__version__}, one thread")
    print(f"{'':32}{'us a step':>10}{'us above bare':>15}{'ratio':>8}")
    for name, (_, base) in CONTENDERS.items():
        if figures[name]:
            pairs = list(zip(figures[name], figures[base], strict=True))
            above, ratio = (statistics.median(v) for v in ([a - b for a, b in pairs], [a / b for a, b in pairs]))
            print(f"{name:32}{statistics.median(figures[name]):10.0f}{above:15.0f}{ratio:8.2f}")


if __name__ == "__main__":
    main()
