"""A user's project (a model, its data and a config), and fixtures that start the runner on it."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # several test processes: one thread each, also in processes they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import atexit
import functools
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from chaos import Zygote

# Runs are signed with a key of their own, not with the user's.
state = tempfile.TemporaryDirectory(prefix="runner-state-")
os.environ["XDG_STATE_HOME"] = state.name
# Interpreters that tests start keep the bytecode of modules, which each would otherwise compile again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# In the background or under nohup these signals are ignored, and processes that the suite starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

MODEL = """
import os
import random
import time

import numpy
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, width=8, dropout=0.3):
        super().__init__()
        self.first = nn.Linear(4, width)
        self.drop = nn.Dropout(dropout)
        self.second = nn.Linear(width, 1)

    def forward(self, x, y):
        loss = ((self.second(self.drop(torch.tanh(self.first(x)))) - y) ** 2).mean()
        return {"loss": loss, "error": loss.sqrt(), "tokens": x.numel()}


class Data:
    def __init__(self, length=50, sleep_s=0.0):
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(length, 4, generator=generator)
        self.sleep_s = sleep_s
        self.lengths = torch.arange(length) % 7 + 1

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        time.sleep(self.sleep_s)
        noise = 0.01 * (random.random() + numpy.random.rand() + torch.rand(()).item())
        return {"x": self.x[index] + noise, "y": self.x[index].sum()[None]}


class Stalls(Data):
    # waits while the file `stall` exists, and makes the file `stalling`
    def __getitem__(self, index):
        while os.path.exists("stall"):
            open("stalling", "w").close()
            time.sleep(0.02)
        return super().__getitem__(index)


class Normed(Model):
    def __init__(self, width=8, dropout=0.3):
        super().__init__(width, dropout)
        self.first = nn.Sequential(self.first, nn.BatchNorm1d(width))


class Drawing(Model):
    # uses every generator, in training and in evaluation
    def forward(self, x, y):
        noise = random.random() + numpy.random.rand() + torch.randn_like(x)
        return super().forward(x + 0.1 * noise, y)


class SlowToBuild(Model):
    # waits until the file `built` exists
    def __init__(self):
        super().__init__()
        while not os.path.exists("built"):
            time.sleep(0.02)


class Raises(Model):
    def __init__(self):
        raise KeyError("its own mistake")


class DropsInterrupt(Model):
    def __init__(self):
        super().__init__()
        try:
            os.kill(os.getpid(), 2)
        except BaseException:
            pass


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield {"x": torch.zeros(4), "y": torch.zeros(1)}


class Plain(Data):
    def __getitem__(self, index):
        return {"x": self.x[index], "y": self.x[index].sum()[None]}


def report(module, dataset):
    picture = torch.zeros(4, 6, 3, dtype=torch.uint8)
    return {"words": "some `text`", "number": torch.tensor(float(len(dataset))), "picture": picture}


def feed(module, batch):
    return module(batch["x"], batch["y"])["loss"] * 2


def fail(module, batch):
    raise RuntimeError("the model's own mistake")


calls = 0


def fail_at_call(module, batch):
    # OWN_FAILURE is the failure and the calls at which it happens, such as nan@7
    global calls
    calls += module.training
    kind, _, call = os.environ.get("OWN_FAILURE", "").partition("@")
    if module.training and call and calls in map(int, call.split(",")):
        module(**batch)  # uses generators, and updates statistics
        if kind == "oom":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return {"loss": module(**batch)["loss"] * float(kind)}
    return module(**batch)
"""

EXPERIMENT = """
# @package _global_
defaults:
  - override /model: null
  - override /data: null
  - override /report: null
name: mine
model: {_target_: own.Model}
data:
  train: {_target_: own.Data, length: 50}
  eval: {_target_: own.Data, length: 20}
  batch_size: 8
  num_workers: 0
  collate: null
  seed_samples: true
optimizer: {lr: 1.0e-2}
scheduler: {warmup_steps: 3}
report: {_target_: own.report}
trainer: {steps: 12, log_every: 1, save_every: 4, eval_every: 6, export_every: 0, keep_last: 0}
"""


WORKER_MODULES = ("torch._dynamo", "torch.distributed.launcher.api", "runner.engines.fsdp", "runner.checkpoint.sharded")


@functools.cache
def _start_zygote():
    zygote = Zygote()
    atexit.register(zygote.close)
    return zygote


def shared_zygote(*modules):
    """Returns the process that forks the runs of all tests, after it has imported these modules too."""
    zygote = _start_zygote()
    zygote.load([*modules])
    return zygote


class Forked:
    """A run in the background, forked from the zygote, with the methods of `Popen` that tests use."""

    def __init__(self, zygote, output, *arguments, **settings):
        self._zygote, self._output = zygote, output
        self.pid = zygote.start(*arguments, output=output, **settings)
        self.returncode = None

    def poll(self):
        if self.returncode is None:
            self.returncode = self._zygote.poll(self.pid)
        return self.returncode

    def wait(self, timeout=120):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"run {self.pid}", timeout, self._output.read_text())
            time.sleep(0.005)
        return self.returncode

    def communicate(self, timeout=120):
        """Waits for the end of the run; returns its output and None for standard error, as `Popen` does."""
        self.wait(timeout)
        return self._output.read_text(), None

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class Project:
    """A folder with a user's module `own` and `conf/experiment/mine.yaml`."""

    loaded = ()  # modules that are imported before runs are forked

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started = []
        (folder / "own.py").write_text(MODEL)
        (folder / "conf" / "experiment").mkdir(parents=True)
        (folder / "conf" / "experiment" / "mine.yaml").write_text(EXPERIMENT)

    @property
    def command(self):
        return [sys.executable, "-m", "runner", "--config-dir", "conf", "experiment=mine"]

    def start(self, *overrides, environment=None, forks_workers=False, **settings):
        """Starts the runner in a forked process with a process group of its own, and does not wait for it.

        With `forks_workers`, a launcher forks its workers too. Other settings are those of `Popen`, and start a new
        interpreter.
        """
        if settings:
            return self.start_afresh(*overrides, environment=environment or {}, **settings)
        output = self.folder / f"printed_{len(self.started)}.txt"
        environment = dict(os.environ) | (environment or {})
        arguments = self.folder, [*self.command[3:], *overrides]
        settings = {"environment": environment, "forks_workers": forks_workers}
        self.started.append(Forked(self._zygote(forks_workers), output, *arguments, **settings))
        return self.started[-1]

    def start_afresh(self, *overrides, **settings):
        """Starts the runner as a user does, in a new interpreter, with its output in one pipe."""
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | settings.pop("environment", {})
        settings = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | settings
        process = subprocess.Popen([*self.command, *overrides], cwd=self.folder, env=environment, text=True, **settings)
        self.started.append(process)
        return process

    def run(self, *overrides, typed=None, status=0, forks_workers=False):
        """Runs to the end in a process forked after importing torch; returns the output.

        `status` is the expected exit status, or a tuple of allowed ones.
        """
        zygote, output = self._zygote(forks_workers), self.folder / "printed.txt"
        output.unlink(missing_ok=True)
        keyboard = None
        if typed is not None:
            keyboard = self.folder / "typed.txt"
            keyboard.write_text(typed)
        pid = zygote.start(
            self.folder, [*self.command[3:], *overrides], environment=dict(os.environ), typed=keyboard,
            forks_workers=forks_workers,
        )  # fmt: skip
        try:
            found, printed = zygote.wait(pid), output.read_text()
        except BaseException:  # such as a timeout of the test: the next test must not wait for this run
            _start_zygote.cache_clear()
            os.killpg(pid, signal.SIGKILL)
            zygote.kill()
            raise
        assert found in (status if isinstance(status, tuple) else (status,)), printed
        return printed

    def _zygote(self, forks_workers):
        return shared_zygote(*self.loaded, *(WORKER_MODULES if forks_workers else ()))

    def run_afresh(self, *overrides, typed=None, status=0):
        """Runs to the end in a new interpreter; returns the output."""
        process = self.start_afresh(*overrides, stdin=subprocess.DEVNULL if typed is None else subprocess.PIPE)
        printed, _ = process.communicate(typed, timeout=120)
        assert process.returncode == status, printed
        return printed

    @property
    def runs(self):
        return sorted(path.parent for path in self.folder.glob("outputs/**/.hydra"))

    def copy(self, name, other):
        """Copies the run folder `name` to `other`, which is replaced."""
        shutil.rmtree(self.folder / other, ignore_errors=True)
        shutil.copytree(self.folder / name, self.folder / other)

    def close(self):
        """Ends all processes that the test started."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
                process.communicate()
            for stream in (getattr(process, "stdin", None), getattr(process, "stdout", None)):
                if stream is not None:
                    stream.close()


@pytest.fixture
def project(tmp_path):
    made = Project(tmp_path)
    yield made
    made.close()


@pytest.fixture
def home(project, monkeypatch):
    """A project as the current directory, its module `own` importable but not imported yet."""
    monkeypatch.chdir(project.folder)
    monkeypatch.syspath_prepend(project.folder)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    yield project
    sys.modules.pop("own", None)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The folder of a run of 12 steps with checkpoints at 4, 8 and 12 and an export, which `trained` copies."""
    project = Project(tmp_path_factory.mktemp("finished"))
    project.run("hydra.run.dir=run", "trainer.export_every=12", "trainer.eval_every=4")
    return project.folder / "run"


@pytest.fixture
def trained(finished_run, project):
    """A project with a finished run in the folder `run`."""
    shutil.copytree(finished_run, project.folder / "run")
    return project


@pytest.fixture
def at_home(trained, monkeypatch):
    """The project of `trained` as the current directory, its module `own` importable but not imported yet."""
    monkeypatch.chdir(trained.folder)
    monkeypatch.syspath_prepend(trained.folder)
    for name in ("own", "evil"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield trained
    for name in ("own", "evil"):
        sys.modules.pop(name, None)


CANARY = "import pathlib\npathlib.Path('canary').touch()\n\n\nclass Evil:\n    pass\n"


def read_numbers(folder):
    """Returns the logged metrics without times and memory."""
    return [{k: v for k, v in line.items() if not k.endswith(("_s", "_gb"))} for line in read_metrics(folder)]


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
