"""After a power loss at any operation, a run resumes from a complete checkpoint and has the metrics up to it."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from power_loss import Disk, Recorder, write_tree
from small_run import CONFIG_FILES, small_config

from runner.checkpoint import shards
from runner.checkpoint.checkpoints import Checkpoints, load
from runner.config.run_folder import claim_folder
from runner.config.spec import ExperimentSpec
from runner.launch.job import Job
from runner.run.run import run
from runner.run.trainer import Trainer
from runner.tracking import event_file
from runner.utils import io
from runner.utils.files import AppendFile, disk
from runner.utils.serialization import HostSnapshot

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # there are many states
RUN = "outputs/day/run"
PLAIN = "plain/checkpoints"


def train(recorder, steps, resume=None):
    folder = recorder.root / RUN
    if resume is None:
        folder, _ = claim_folder(folder, is_asked_for=True)
    else:
        recorder.mark("resume", resume)
        resume = str(folder / "checkpoints" / f"step_{resume:08d}")
    job = Job(ExperimentSpec.from_plain(small_config(steps, resume)), folder, CONFIG_FILES)
    assert run(job.spec, folder, job.write_config) == 0
    recorder.mark("finished")


def save_plainly(recorder):
    """Appends to a file, and saves a step, the same step again, and a step in shards, of which one is kept."""
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
    snapshot = HostSnapshot({"weight": torch.ones(2)})
    shards.write({f"model/{name}": tensor for name, tensor in snapshot.tensors.items()}, partial / "shards")
    io.write_new_json({"model": snapshot.document}, partial / "structure.json")
    checkpoints.commit(partial, 4, {"step": 4})
    recorder.mark("plain", 4)


@pytest.fixture(scope="module")
def recorded():
    """The recorded events of a run, resumed from an older checkpoint and from its newest, and of plain saves."""
    with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryDirectory(dir=MEMORY) as name:
        recorder = Recorder(Path(name), monkeypatch)
        saved = Trainer._saved
        export = Trainer.export

        def mark_saved(trainer, step, path):
            recorder.mark("saved", step)
            saved(trainer, step, path)

        def mark_exported(trainer):
            export(trainer)
            recorder.mark("exported")

        monkeypatch.setattr(Trainer, "_saved", mark_saved)
        monkeypatch.setattr(Trainer, "export", mark_exported)
        train(recorder, 4)
        train(recorder, 3, resume=2)
        train(recorder, 5, resume=3)
        save_plainly(recorder)
    return recorder.events


def find_fault(root, promises):
    """Returns the first promise of the program that a state of its files breaks, or None."""
    appended = root / "plain" / "appended"
    if "appended" in promises and not (appended.is_file() and appended.read_bytes() == b"1\n"):
        return "what was appended is lost"
    fault = find_checkpoint_fault(root / PLAIN, promises.get("plain"))
    if fault or "saved" not in promises:
        return fault
    folder = root / RUN
    if fault := find_checkpoint_fault(folder / "checkpoints", promises["saved"]):
        return fault
    newest, _ = Checkpoints(folder / "checkpoints").newest()
    step = load(newest)["trainer.json"]["loop"]["step"]
    for name, content in CONFIG_FILES.items():
        path = folder / ".hydra" / f"{name}.yaml"
        if not path.is_file() or path.read_bytes() != content:
            return f"{path.name} is lost"
    for name, steps in (("metrics.jsonl", logged_steps(folder)), ("the event files", event_steps(folder))):
        if sorted(logged for logged in steps if logged <= step) != [*range(1, step + 1)]:
            return f"{name} have steps {steps} beside a checkpoint of step {step}"
    for path in (folder / "exports").glob("*.safetensors"):
        io.load(path)
    if "exported" in promises and not (folder / "exports" / "model.safetensors").is_file():
        return "an export is lost"
    record = json.loads((folder / "run.json").read_text())
    best = record["best"]
    if best is not None and not Checkpoints(folder / "checkpoints").has(best["step"]):
        return f"run.json names step {best['step']} as the best, which can't be loaded"
    has_end = record["status"] == "finished" and "_hparams_/session_end_info" in tags_in(folder)
    if "finished" in promises and not has_end:
        return "the end is not recorded"
    return None


def find_checkpoint_fault(folder, saved):
    checkpoints = Checkpoints(folder)
    checkpoints.recover()
    path, faults = checkpoints.newest()
    if faults:
        return faults[0]
    if saved is not None and (path is None or int(path.name[5:]) < saved):
        return f"the newest checkpoint is {path}, that of step {saved} was saved"
    incomplete = [step.name for step in folder.glob("step_*") if not checkpoints.has(int(step.name[5:]))]
    return f"{incomplete[0]} is incomplete" if incomplete else None


def logged_steps(folder):
    path = folder / "metrics.jsonl"
    steps = []
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


def event_steps(folder):
    return [event.step for event in events_in(folder) if "train/loss" in {value.tag for value in event.summary.value}]


class Simulation:
    """Checks every state that a power loss may leave, each once."""

    def __init__(self, events):
        self.events = events
        self.passed = set()

    def find_fault(self, is_dropped=lambda event: False):
        """Returns the first event after which a state breaks a promise, and the broken promise; None if there is none.

        Args:
            is_dropped: returns whether an event is left out of the simulation.
        """
        simulated = Disk()
        promises = {}
        for number, event in enumerate(self.events):
            if event.kind in ("saved", "plain"):
                promises[event.kind] = int(event.path)
            elif event.kind == "resume":
                promises = {"saved": int(event.path)}
            elif event.kind in ("exported", "finished", "appended"):
                promises[event.kind] = True
            if is_dropped(event):
                continue
            simulated.do(event)
            for tree in simulated.states():
                key = hash((frozenset(tree.items()), frozenset(promises.items())))
                if key in self.passed:
                    continue
                with tempfile.TemporaryDirectory(dir=MEMORY) as name:
                    write_tree(tree, Path(name))
                    try:
                        fault = find_fault(Path(name), promises)
                    except (ValueError, OSError) as error:
                        fault = repr(error)
                if fault:
                    return f"after operation {number}, {event.kind} {event.path} ({event.site}): {fault}"
                self.passed.add(key)
        return None


@pytest.fixture(scope="module")
def simulation(recorded):
    return Simulation(recorded)


def test_a_power_loss_at_any_operation_breaks_no_promise(simulation):
    assert simulation.find_fault() is None


def test_every_synchronization_is_needed(simulation):
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
