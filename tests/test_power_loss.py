"""After a loss of power at any operation a run goes on from a complete checkpoint, with the numbers up to it."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from power_loss import Disk, Recorder, write_tree
from torch import nn

from runner.checkpoint import shards
from runner.checkpoint.checkpoints import Checkpoints, load
from runner.config import checks
from runner.config.run_folder import claim
from runner.launch.job import Job
from runner.run.run import run
from runner.run.trainer import Trainer
from runner.tracking import event_file
from runner.utils import io
from runner.utils.files import AppendFile, disk
from runner.utils.serialization import HostSnapshot

FILES = {"config": b"name: power\n", "overrides": b"[]\n"}
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # states are many
RUN, PLAIN = "outputs/day/run", "plain/checkpoints"


class Model(nn.Module):
    """Gets better with each step."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return {"loss": (self.weight * x).square().mean()}


class Data:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"x": torch.full((2,), index + 1.0)}


def settings(steps, resume=None):
    checks.register()
    with initialize_config_dir(str(checks.CONF_DIR), version_base="1.3"):
        plain = checks.to_plain(compose("config"))
    plain["trainer"] |= {"steps": steps, "save_every": 2, "eval_every": 2, "export_every": 2, "log_every": 1}
    plain["trainer"] |= {"keep_last": 2, "keep_best": 1, "eval_at_start": True}
    data = {"_target_": "test_power_loss.Data"}
    plain["data"] |= {"train": data, "eval": data, "batch_size": 2, "num_workers": 0, "collate": None}
    plain |= {"name": "power", "model": {"_target_": "test_power_loss.Model"}, "report": None, "scheduler": None}
    plain |= {"optimizer": {"_target_": "torch.optim.SGD", "lr": 0.01}, "resume": resume, "pattern": None}
    plain["tracking"] |= {"progress": False, "stdin": False}
    return plain


def train(recorder, steps, resume=None):
    folder = recorder.root / RUN
    if resume is None:
        folder, _ = claim(folder, is_asked_for=True)
    else:
        recorder.mark("resume", resume)
        resume = str(folder / "checkpoints" / f"step_{resume:08d}")
    handover = Job(settings(steps, resume), folder, FILES)
    assert run(handover.settings, folder, handover.write_config) == 0
    recorder.mark("finished")


def save_plainly(recorder):
    """Appends to a file; saves a step, the same step again, then one in shards, and keeps the last alone."""
    folder = recorder.root / PLAIN
    disk.make_folder(folder.parent)
    disk.sync_folder(recorder.root)
    file = AppendFile(folder.parent / "appended")
    file.append(b"1\n")
    file.sync()
    file.close()
    recorder.mark("appended")
    checkpoints = Checkpoints(folder, keep_last=1)
    for step in (2, 2):
        checkpoints.save(step, {"model": {"weight": torch.ones(2)}}, {"step": step})
        recorder.mark("plain", step)
    partial = checkpoints.begin(4)
    disk.make_folder(partial / "shards")
    packed = HostSnapshot({"weight": torch.ones(2)})
    shards.write({f"model/{name}": tensor for name, tensor in packed.tensors.items()}, partial / "shards")
    io.write_new_json({"model": packed.document}, partial / "structure.json")
    checkpoints.commit(partial, 4, {"step": 4})
    recorder.mark("plain", 4)


@pytest.fixture(scope="module")
def recorded():
    """A run, resumed from an older checkpoint, then from its newest, and plain saves: all that was done to files."""
    with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryDirectory(dir=MEMORY) as name:
        recorder = Recorder(Path(name), monkeypatch)
        saved, export = Trainer._saved, Trainer.export

        def mark_saved(session, step, path):
            recorder.mark("saved", step)
            saved(session, step, path)

        def mark_exported(session):
            export(session)
            recorder.mark("exported")

        monkeypatch.setattr(Trainer, "_saved", mark_saved)
        monkeypatch.setattr(Trainer, "export", mark_exported)
        train(recorder, 4)
        train(recorder, 3, resume=2)
        train(recorder, 5, resume=3)
        save_plainly(recorder)
    return recorder.events


def find_fault(root, told):
    """Says what of a run's promises a state of its files breaks, or None. `told` is what the program had told."""
    appended = root / "plain" / "appended"
    if "appended" in told and not (appended.is_file() and appended.read_bytes() == b"1\n"):
        return "what was appended is lost"
    fault = find_checkpoint_fault(root / PLAIN, told.get("plain"))
    if fault or "saved" not in told:
        return fault
    folder = root / RUN
    if fault := find_checkpoint_fault(folder / "checkpoints", told["saved"]):
        return fault
    newest, _ = Checkpoints(folder / "checkpoints").newest()
    step = load(newest)["trainer.json"]["loop"]["step"]
    for name, content in FILES.items():
        path = folder / ".hydra" / f"{name}.yaml"
        if not path.is_file() or path.read_bytes() != content:
            return f"{path.name} is lost"
    for name, found in (("metrics.jsonl", logged(folder)), ("the event files", shown(folder))):
        if sorted(each for each in found if each <= step) != [*range(1, step + 1)]:
            return f"{name} have steps {found} beside a checkpoint of step {step}"
    for path in (folder / "exports").glob("*.safetensors"):
        io.load(path)
    if "exported" in told and not (folder / "exports" / "model.safetensors").is_file():
        return "an export is lost"
    record = json.loads((folder / "run.json").read_text())
    best = record["best"]
    if best is not None and not Checkpoints(folder / "checkpoints").has(best["step"]):
        return f"run.json names step {best['step']} as the best, which can't be loaded"
    if "finished" in told and (record["status"] != "finished" or "_hparams_/session_end_info" not in tags_in(folder)):
        return "the end is told of nowhere"
    return None


def find_checkpoint_fault(folder, saved):
    checkpoints = Checkpoints(folder)
    checkpoints.recover()
    path, faults = checkpoints.newest()
    if faults:
        return faults[0]
    if saved is not None and (path is None or int(path.name[5:]) < saved):
        return f"the newest checkpoint is {path}, that of step {saved} was saved"
    incomplete = [each.name for each in folder.glob("step_*") if not checkpoints.has(int(each.name[5:]))]
    return f"{incomplete[0]} is incomplete" if incomplete else None


def logged(folder):
    path, steps = folder / "metrics.jsonl", []
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        if line.endswith(b"}\n") and "train/loss" in (values := json.loads(line)):
            steps.append(values["step"])
    return steps


def events_in(folder):
    for path in event_file.find_event_files(folder):
        with open(path, "rb") as file:
            yield from (event_file.Event.FromString(record) for record in event_file.read_records(file))


def tags_in(folder):
    return {value.tag for event in events_in(folder) for value in event.summary.value}


def shown(folder):
    return [event.step for event in events_in(folder) if "train/loss" in {value.tag for value in event.summary.value}]


class Simulation:
    """Looks at every state that a loss of power may leave, each once."""

    def __init__(self, events):
        self.events, self.passed = events, set()

    def find_fault(self, is_dropped=lambda event: False):
        """Returns the first state that breaks a promise: after which event, and what is wrong."""
        simulated, told = Disk(), {}
        for number, event in enumerate(self.events):
            if event.kind in ("saved", "plain"):
                told[event.kind] = int(event.path)
            elif event.kind == "resume":
                told = {"saved": int(event.path)}
            elif event.kind in ("exported", "finished", "appended"):
                told[event.kind] = True
            if is_dropped(event):
                continue
            simulated.do(event)
            for tree in simulated.states():
                key = hash((frozenset(tree.items()), frozenset(told.items())))
                if key in self.passed:
                    continue
                with tempfile.TemporaryDirectory(dir=MEMORY) as name:
                    write_tree(tree, Path(name))
                    try:
                        fault = find_fault(Path(name), told)
                    except (ValueError, OSError) as error:
                        fault = repr(error)
                if fault:
                    return f"after operation {number}, {event.kind} {event.path} ({event.site}): {fault}"
                self.passed.add(key)
        return None


@pytest.fixture(scope="module")
def simulation(recorded):
    return Simulation(recorded)


def test_after_a_loss_of_power_anywhere_the_run_goes_on_with_all_that_was_told(simulation):
    assert simulation.find_fault() is None


def test_without_any_one_synchronization_something_is_lost(simulation):
    assert simulation.find_fault() is None
    syncs = [event for event in simulation.events if event.kind.startswith("sync_") and event.site]
    sites = {f"{event.kind} {event.site}" for event in syncs}
    assert len(sites) > 10
    faults = {
        site: simulation.find_fault(lambda event, site=site: f"{event.kind} {event.site}" == site)
        for site in sorted(sites)
    }
    for site, fault in faults.items():
        print(f"without {site}: {fault}")
    assert [site for site, fault in faults.items() if fault is None] == []
