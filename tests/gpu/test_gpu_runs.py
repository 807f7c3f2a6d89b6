"""Whole runs on a GPU: exact, resumed, evaluated, on two ranks of one GPU, and without waiting for the device.

Without a GPU the same runs are made on the CPU; what needs a GPU is skipped.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Project, read_numbers

from runner.utils import io
from runner.utils.sampler import RandomSampler
from runner.utils.sampler.batches import Batches
from runner.utils.sampler.device_copies import BatchCopier, DeviceStream
from tests.gpu.accelerator import DELAY_CYCLES, DEVICE, HAS_GPU, LONG_DELAY_CYCLES, needs_gpu

pytestmark = pytest.mark.gpu
ON_DEVICE = f"distributed.device={DEVICE.type}"
OFFLOADED = "optimizations.unsloth={offload:always,min_bytes:0,keep_last:0}"
FINAL = Path("checkpoints/step_00000012")
OWN = """

import json
import traceback
import warnings

torch.use_deterministic_algorithms(True)  # what is compared to the bit is to repeat


class Block(nn.Module):
    fault = 0  # the call, counted from now, in which memory runs out; 0 for none

    def __init__(self, width, dropout):
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(dropout)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        if self.fault:
            self.fault -= 1
            if not self.fault:
                take_too_much(device=x.device)
        return x + self.drop(self.down(torch.relu(self.up(self.norm(x)))))


class Blocks(nn.Module):
    def __init__(self, width=64, depth=4, dropout=0.1):
        super().__init__()
        self.first, self.last = nn.Linear(4, width), nn.Linear(width, 1)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))

    def forward(self, x, y):
        x = self.first(x)[:, None].expand(-1, 256, -1).contiguous()  # inputs of 0.5 MiB: the run tells what it moves
        for block in self.blocks:
            x = block(x)
        loss = ((self.last(x)[..., 0] - y) ** 2).mean()
        return {"loss": loss, "error": loss.detach().sqrt()}


waits = []
SEEN, LAST = 5, 10  # training calls between which waits are counted: the undisturbed steps


def note_wait(message, *place, **more):
    if "called a synchronizing" in str(message):
        waits.append("".join(traceback.format_stack(limit=14)))


def watch(owner, name):
    # torch does not warn of what waits by name
    original = getattr(owner, name)

    def noted(*args, **kwargs):
        waits.append(name + "\\n" + "".join(traceback.format_stack(limit=14)))
        return original(*args, **kwargs)

    setattr(owner, name, noted)


def count_waits(module, batch):
    # writes down each place that waits for the device, as torch tells of it
    global calls
    calls += module.training
    if module.training and calls == SEEN:
        warnings.simplefilter("always")
        warnings.showwarning = note_wait
        watch(torch.cuda, "synchronize")
        watch(torch.cuda.Event, "synchronize")
        watch(torch.cuda.Stream, "synchronize")
        torch.cuda.set_sync_debug_mode("warn")
    if module.training and calls == LAST:
        torch.cuda.set_sync_debug_mode("default")
        pathlib.Path("waits.json").write_text(json.dumps(waits))  # of the steps before this one
    output = module(**batch)
    if kind := os.environ.get("OWN_WAITS"):
        output["loss"].item() if kind == "item" else torch.cuda.synchronize()
    return output


def take_too_much(*ignored, device="cpu"):
    torch.empty(1 << 50, dtype=torch.uint8, device=device)


def go_wrong(module, batch):
    # in the fifth training call, as OWN_FAULT says
    global calls
    calls += module.training
    fault = os.environ["OWN_FAULT"] if module.training and calls == 5 else ""
    module.blocks[2].fault = {"block": 1, "recomputation": 2}.get(fault, 0)  # its copies are under way then
    output = module(**batch)
    device = output["loss"].device
    if fault == "nan":
        output["loss"] = output["loss"] * float("nan")
    elif fault == "loss":
        take_too_much(device=device)
    elif fault == "backward":
        output["loss"].register_hook(lambda grad: take_too_much(device=device))
    return output
"""
MAPPED = """
# @package _global_
defaults: [mine]
optimizations: {device_map: {budgets: BUDGETS, bytes_factor: 1.0}}
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    made = Project(tmp_path)
    path = tmp_path / "own.py"
    path.write_text("import pathlib\n" + path.read_text() + OWN)
    yield made
    made.close()


def train(project: Project, folder: str, *overrides: str, **settings: Any) -> str:
    """Runs the experiment with a model of blocks on the device; returns what was printed."""
    given = ["model._target_=own.Blocks", ON_DEVICE, f"hydra.run.dir={folder}", "tracking.tensorboard=false"]
    printed = project.run(*given, *overrides, **settings)
    if OFFLOADED in overrides:
        assert "recomputed in the backward pass" in printed
        (total,) = re.findall(r"^all +\d+ +([\d.]+) MiB +([\d.]+) MiB", printed, re.MULTILINE)
        assert (float(total[1]) > 0) is HAS_GPU  # bytes of inputs that were moved
    return printed


def weights(project: Project, folder: str) -> list[bytes]:
    path = project.folder / folder / FINAL
    return [(path / name).read_bytes() for name in ("model.safetensors", "model.optimizer.safetensors")]


def losses(project: Project, folder: str) -> list[float]:
    return [line["train/loss"] for line in read_numbers(project.folder / folder) if "train/loss" in line]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_with_offloaded_blocks_resumes_as_the_same_run(project: Project, precision: str) -> None:
    same = f"trainer.precision={precision}"
    train(project, "plain", same)
    train(project, "run", same, OFFLOADED)
    assert read_numbers(project.folder / "run") == read_numbers(project.folder / "plain")
    assert weights(project, "run") == weights(project, "plain")
    project.copy("run", "again")
    project.run("resume=again/checkpoints/step_00000004", "allow_targets=[own]", ON_DEVICE)
    assert read_numbers(project.folder / "again") == read_numbers(project.folder / "run")
    assert weights(project, "again") == weights(project, "run")


def test_a_run_is_evaluated_to_the_logged_loss_and_resumes_without_a_gpu(project: Project) -> None:
    train(project, "run", OFFLOADED)
    logged = read_numbers(project.folder / "run")[-1]["eval/loss"]
    command = [sys.executable, "-m", "runner.evaluate", "run", "--allow-targets", "own"]
    numbers = {"cpu": pytest.approx(logged, rel=1e-5)} | {DEVICE.type: logged}  # without a GPU one and the same
    for device, expected in numbers.items():
        done = subprocess.run(
            [*command, f"distributed.device={device}"], cwd=project.folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("eval/loss ")]
        assert float(line.split()[1]) == expected
    project.copy("run", "again")
    from_gpu = ["resume=again/checkpoints/step_00000008", "allow_targets=[own]", "distributed.device=cpu"]
    project.run(*from_gpu)  # draws other dropout there, on the same samples
    assert len(losses(project, "again")) == 12


@pytest.mark.parametrize("fault", ["block", "loss", "backward", "recomputation"])
def test_a_step_that_runs_out_of_memory_is_skipped_completely(
    project: Project, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip = ("trainer.on_oom=skip", "trainer.on_nonfinite=skip", "feeder={_target_:own.go_wrong}", OFFLOADED)
    for folder, own in (("nan", "nan"), ("oom", fault)):
        monkeypatch.setenv("OWN_FAULT", own)
        printed = train(project, folder, *skip)
    assert "Out of memory in step 5" in printed
    assert "left out" in printed
    one, other = (io.load(project.folder / folder / FINAL / "model.safetensors") for folder in ("nan", "oom"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    one, other = (io.load(project.folder / folder / FINAL / "model.optimizer.safetensors") for folder in ("nan", "oom"))
    assert one["counters"]["steps"] == other["counters"]["steps"] == 11
    for index, state in one["optimizer"]["state"].items():
        assert all(torch.equal(value, other["optimizer"]["state"][index][name]) for name, value in state.items())


@needs_gpu
@pytest.mark.parametrize(
    "given",
    [
        [],
        [OFFLOADED],
        ["optimizations.unsloth={offload:auto,min_bytes:0}"],
        ["trainer.precision=bf16", "data.num_workers=2"],
    ],
    ids=["plain", "offloaded", "auto", "bf16, workers"],
)
def test_an_undisturbed_step_waits_for_no_device(project: Project, given: list[str]) -> None:
    quiet = ("trainer.log_every=12", "trainer.save_every=0", "trainer.eval_every=0")
    train(project, "run", *quiet, "feeder={_target_:own.count_waits}", *given)
    waits = json.loads((project.folder / "waits.json").read_text())
    assert not waits, f"{len(waits)} waits; the first:\n{waits[0]}"


@needs_gpu
@pytest.mark.parametrize("kind", ["item", "synchronize"])
def test_a_wait_in_a_step_is_counted(project: Project, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWN_WAITS", kind)
    quiet = ("trainer.log_every=12", "trainer.save_every=0", "trainer.eval_every=0")
    train(project, "run", *quiet, "feeder={_target_:own.count_waits}")
    assert len(json.loads((project.folder / "waits.json").read_text())) == 5


def test_a_model_on_the_gpu_and_the_cpu_trains_as_on_one_device(project: Project) -> None:
    budgets = "{'cuda:0': 140000, cpu: null}" if HAS_GPU else "{cpu: null}"  # first and last layer, 2 of 4 blocks
    (project.folder / "conf/experiment/mapped.yaml").write_text(MAPPED.replace("BUDGETS", budgets))
    train(project, "plain", "+model.dropout=0.0")
    printed = train(project, "run", "experiment=mapped", "+model.dropout=0.0")
    assert losses(project, "run") == pytest.approx(losses(project, "plain"), rel=1e-4)
    if HAS_GPU:
        assert "blocks.0" in next(line for line in printed.splitlines() if "cuda:0:" in line)
        assert "blocks.3" in next(line for line in printed.splitlines() if "cpu:" in line)
    else:
        assert weights(project, "run") == weights(project, "plain")


def test_float8_trains_near_its_emulation(project: Project) -> None:
    if HAS_GPU and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU of compute capability 8.9 or more")
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("needs torchao")
    given = ("data.batch_size=32", "trainer.precision=bf16", "optimizer.lr=1e-3", "+model.dropout=0.0")
    train(project, "emulated", *given, "optimizations.fp8={enabled:true,emulate:true}")
    printed = train(project, "run", *given, f"optimizations.fp8={{enabled:true,emulate:{str(not HAS_GPU).lower()}}}")
    assert "fp8" in printed
    found = losses(project, "run")
    assert found[-1] < 0.5 * found[0]
    assert found == pytest.approx(losses(project, "emulated"), rel=0.1)


def stream(num_workers: int, is_pinned: bool) -> Batches:
    dataset = [{"x": torch.full((3,), float(i)), "pair": (torch.tensor(i), f"text {i}")} for i in range(40)]
    sampler = RandomSampler(len(dataset), seed=3)
    return Batches(dataset, sampler, 8, num_workers=num_workers, pin_memory=is_pinned)


@needs_gpu
@pytest.mark.parametrize("num_workers", [0, 2])
def test_pinned_batches_are_the_same_batches_and_resume_at_their_position(num_workers: int) -> None:
    plain, pinned = stream(0, False), stream(num_workers, True)
    try:
        for number in range(12):
            expected, found = next(plain), next(pinned)
            assert found["x"].is_pinned()
            assert found["pair"][0].is_pinned()
            assert torch.equal(found["x"], expected["x"])
            assert found["pair"][1] == expected["pair"][1]
            assert torch.equal(found["x"].to(DEVICE, non_blocking=True).cpu(), expected["x"])
            assert pinned.state_dict() == plain.state_dict()
            if number == 6:
                state = pinned.state_dict()
                pinned.close()
                pinned = stream(num_workers, True)
                pinned.load_state_dict(state)
    finally:
        pinned.close()


@needs_gpu
def test_batches_being_copied_to_the_device_are_not_overwritten() -> None:
    """The next batches are pinned and copied while the device is still busy with work before them."""
    batches, found, expected = stream(0, True), [], []
    torch.cuda._sleep(200_000_000)  # some 0.1 s
    for _ in range(50):
        batch: Any = next(batches)
        expected.append(batch["x"].clone())
        found.append(batch["x"].to(DEVICE, non_blocking=True))
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.cpu(), theirs)


class LateStream(DeviceStream):
    """Delays each copy, so that a missing wait for it gives wrong numbers."""

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(DELAY_CYCLES)
        return super().copy(tensor)


@needs_gpu
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("late", ["copies", "computing"])
def test_batches_copied_beside_the_computing_arrive_whole_and_are_not_overwritten(late: str, num_workers: int) -> None:
    plain, copied = stream(0, False), stream(num_workers, True)
    copied.copy_with(BatchCopier((LateStream if late == "copies" else DeviceStream)(DEVICE)))
    found, expected = [], []
    try:
        for _ in range(50):
            batch: Any = next(copied)
            assert batch["x"].is_cuda
            if late == "computing":  # memory that is freed below must not be used for the next copy
                torch.cuda._sleep(LONG_DELAY_CYCLES)
            found.append(batch["x"] + batch["pair"][0][:, None])
            del batch
            if copied.prefetch is not None:
                copied.prefetch()
            batch = next(plain)
            expected.append(batch["x"] + batch["pair"][0][:, None])
            assert copied.state_dict() == plain.state_dict()
    finally:
        copied.close()
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.cpu(), theirs)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_on_one_device_agree_with_one_process_and_offloading_changes_nothing(
    project: Project, strategy: str
) -> None:
    alike = ("+model.dropout=0.0", "optimizer.lr=1e-3")  # at larger rates rounding grows from step to step
    device = "cuda:0" if HAS_GPU else "cpu"
    ranks = (f"distributed={strategy}", "distributed.nproc_per_node=2", f"distributed.device={device}")
    train(project, "one", *alike)
    is_forked = not HAS_GPU  # CUDA does not outlive a fork
    train(project, "plain", *alike, *ranks, forks_workers=is_forked)
    train(project, "run", *alike, *ranks, OFFLOADED, forks_workers=is_forked)
    assert read_numbers(project.folder / "run") == read_numbers(project.folder / "plain")
    assert losses(project, "run") == pytest.approx(losses(project, "one"), rel=1e-4)
    assert json.loads((project.folder / "run/run.json").read_text())["ranks"] == 2
