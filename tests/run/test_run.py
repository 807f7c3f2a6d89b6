import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from chaos import TIMES
from conftest import read_metrics
from run_comparison import assert_equal, assert_same_run, load_weights, read_untimed_metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from waiting import wait_for_step

from runner.checkpoint.checkpoints import _with_checksum, load
from runner.utils import io


def test_a_run_leaves_a_folder_that_answers_every_question(project):
    printed = project.run("trainer.export_every=12")
    (folder,) = project.runs
    assert re.fullmatch(r"outputs/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d-mine", str(folder.relative_to(project.folder)))
    names = {path.name for path in folder.iterdir()}
    assert {".hydra", "run.json", "metrics.jsonl", "log.txt", "checkpoints", "exports"} <= names
    files = ["config.yaml", "hydra.yaml", "overrides.yaml", "signature.json"]
    assert sorted(p.name for p in (folder / ".hydra").iterdir()) == files
    assert sorted(p.name for p in (folder / "checkpoints").glob("step_*")) == [f"step_{n:08d}" for n in (4, 8, 12)]
    assert sorted(p.name for p in (folder / "checkpoints" / "step_00000012").iterdir()) == [
        "MANIFEST.json",
        "model.optimizer.safetensors",
        "model.safetensors",
        "trainer.json",
    ]
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["last_step"], record["ranks"]) == ("finished", 12, 1)
    assert record["best"]["name"] == "eval/loss"
    assert record["packages"]["torch"] == torch.__version__
    exported = io.load(folder / "exports" / "model.safetensors")
    assert_equal(exported, dict(load_weights(folder, 12)[0]))
    assert "Model, 49 parameters, on" in printed
    assert "eval/words" in (folder / "log.txt").read_text()


def test_metrics_and_events_hold_each_step_once_with_the_same_numbers(project):
    project.run()
    (folder,) = project.runs
    lines = read_metrics(folder)
    trained = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in trained] == list(range(1, 13))
    expected = {"train/loss", "train/error", "train/lr", "train/grad_norm", *TIMES, "step"}
    assert trained[0].keys() == expected
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 6, 12]
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    assert shown == pytest.approx({line["step"]: line["train/loss"] for line in trained})
    assert "eval/words/text_summary" in events.Tags()["tensors"] or "eval/words" in events.Tags()["tensors"]
    assert "eval/picture" in events.Tags()["images"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "overrides",
    [
        ["sampler=pool", "trainer.accumulate=2"],
        ["sampler=batched_ordered", "sampler.max_size=null", "sampler.max_cost=40"],
        ["sampler=random", "trainer.precision=bf16", "trainer.log_every=3"],
        ["sampler=ordered", "trainer.precision=fp16", "model._target_=own.Normed", "allow_targets=[own]"],
        ["+engines.a={}", "+engines.b={model: {_target_: own.Normed}}", "trainer.log_every=5", "allow_targets=[own]"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_a_run_that_was_cut_is_the_same_run_bit_for_bit(project, overrides, workers):
    project.run(*overrides, "hydra.run.dir=whole")
    project.run(*overrides, "hydra.run.dir=cut", typed="quit@5\n")
    project.run("resume=cut", f"data.num_workers={workers}", *[o for o in overrides if o.startswith("allow")])
    assert_same_run(project.folder / "whole", project.folder / "cut", 12)


def test_what_a_forward_draws_depends_on_neither_workers_nor_the_cut(project):
    drawing = (
        "model._target_=own.Drawing",
        "data.seed_samples=false",
        *(f"data.{each}._target_=own.Plain" for each in ("train", "eval")),
    )
    project.run(*drawing, "hydra.run.dir=whole")
    project.run(*drawing, "hydra.run.dir=workers", "data.num_workers=2")
    project.run(*drawing, "hydra.run.dir=cut", typed="quit@5\n")
    project.run("resume=cut", "allow_targets=[own]")
    for other in ("workers", "cut"):
        assert_same_run(project.folder / "whole", project.folder / other, 12)


def test_resume_goes_on_in_the_same_folder_with_its_own_overrides(project):
    project.run("+model.width=16", typed="quit@5\n")
    (folder,) = project.runs
    printed = project.run("resume=latest", "trainer.steps=14")
    assert project.runs == [folder]
    assert "Going on after step 5" in printed
    lines = [line["step"] for line in read_metrics(folder) if "train/loss" in line]
    assert lines == list(range(1, 15))
    assert load_weights(folder, 14)[0]["first.weight"].shape == (16, 4)
    record = json.loads((folder / "run.json").read_text())
    assert [session["status"] for session in record["sessions"]] == ["quit", "finished"]


def test_resume_of_one_checkpoint_goes_on_from_that_one(project):
    project.run("hydra.run.dir=run")
    project.run("resume=run/checkpoints/step_00000004")
    lines = [line["step"] for line in read_metrics(project.folder / "run") if "train/loss" in line]
    assert lines == list(range(1, 13))


def test_a_new_learning_rate_takes_effect_on_resume(project):
    project.run("hydra.run.dir=run", typed="quit@5\n")
    project.run("resume=run", "optimizer.lr=0.5", "scheduler.final_factor=1.0")
    rates = {line["step"]: line["train/lr"] for line in read_metrics(project.folder / "run") if "train/lr" in line}
    assert rates[4] < 0.01 + 1e-9
    assert rates[12] == pytest.approx(0.5)


@pytest.mark.parametrize("place", ["resume=latest", "resume=nowhere", "resume=conf"])
def test_resuming_what_is_not_there_is_an_error_and_starts_nothing(project, place):
    printed = project.run(place, status=2)
    assert printed.startswith("resume=")
    assert len(printed.splitlines()) == 1
    assert project.runs == []


def test_a_harmed_checkpoint_is_named_and_passed_over(project):
    project.run("hydra.run.dir=run")
    newest = project.folder / "run" / "checkpoints" / "step_00000012" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-3])
    printed = project.run("resume=run")
    assert re.search(r"Passed over: .*step_00000012: model.safetensors has \d+ bytes", printed)
    assert "Going on after step 8" in printed


def test_typed_commands_are_done_and_a_wrong_one_is_answered(project):
    printed = project.run(
        "trainer.eval_every=0", "trainer.save_every=0", typed="save\neval@5\nlr 1e-4\nnonsense\nsavee\nquit@9\n"
    )
    (folder,) = project.runs
    lines = read_metrics(folder)
    assert [line["step"] for line in lines if "eval/loss" in line] == [5]
    assert "nonsense" in printed
    assert re.search(r"savee.*save", printed)
    assert (folder / "checkpoints" / "step_00000001").is_dir()
    assert (folder / "checkpoints" / "step_00000009").is_dir()
    assert max(line["train/lr"] for line in lines if line["step"] > 1 and "train/lr" in line) <= 1e-4
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["last_step"]) == ("quit", 9)


def test_a_scheduled_command_outlives_a_resume(project):
    project.run("hydra.run.dir=run", typed="eval@8\nquit@5\n")
    project.run("resume=run")
    assert [line["step"] for line in read_metrics(project.folder / "run") if "eval/loss" in line] == [0, 6, 8, 12]


@pytest.mark.parametrize("redirection", ["< /dev/null", "0<&-", "< conf/experiment/mine.yaml"])
def test_any_stdin_will_do(project, redirection):
    command = " ".join([*project.command, "trainer.steps=2", redirection])
    done = subprocess.run(["bash", "-c", command], cwd=project.folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_shell_loop_over_a_pipe_keeps_its_lines(project):
    loop = "printf '2\\n3\\n' | while read steps; do %s trainer.steps=$steps hydra.run.dir=run$steps; done"
    command = loop % " ".join(project.command)
    done = subprocess.run(["bash", "-c", command], cwd=project.folder, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("is no command: nothing of it is read; tracking.stdin=true reads it") == 1
    for steps in (2, 3):
        assert read_metrics(project.folder / f"run{steps}")[-1]["step"] == steps


SLOW = ("data.train.length=50", "+data.train.sleep_s=0.01", "trainer.steps=2000", "trainer.save_every=0")


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_once_saves_and_ends_with_130(project, workers):
    process = project.start_afresh(*SLOW, f"data.num_workers={workers}", start_new_session=True)
    wait_for_step(project, 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: every process of the group gets it
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    assert "Traceback" not in printed
    (folder,) = project.runs
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "interrupted"
    assert (folder / "checkpoints" / f"step_{record['last_step']:08d}" / "MANIFEST.json").is_file()


def test_ctrl_c_twice_ends_at_once(project):
    overrides = ("data.train.length=50", "+data.train.sleep_s=20", "trainer.eval_at_start=false")
    process = project.start_afresh(*SLOW[2:], *overrides)
    while "steps into" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(1)  # in the midst of the first batch, which takes 160 s
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    (folder,) = project.runs
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"


def test_on_a_terminal_there_is_a_bar_and_commands_are_typed(project):
    main, other = pty.openpty()
    process = subprocess.Popen(
        [*project.command, *SLOW], cwd=project.folder, stdin=other, stdout=other, stderr=other, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(other)
    printed, deadline, is_typed = b"", time.monotonic() + 120, False
    while process.poll() is None and time.monotonic() < deadline:
        if select.select([main], [], [], 0.1)[0]:
            try:
                printed += os.read(main, 65536)
            except OSError:
                break
        if not is_typed and b"step/s" in printed:
            os.write(main, b"time\nquit\n")
            is_typed = True
    assert process.wait(timeout=10) == 0
    os.close(main)
    assert re.search(rb"\d+/2000 \[", printed)
    assert b"train/loss" in printed or b"loss=" in printed
    assert re.search(rb"step \d+ of 2,?000", printed)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model._target_=no.such.Class"], "model._target_=no.such.Class: there is no module 'no'"),
        (["model._target_=own.Modle"], "model._target_=own.Modle: own has no 'Modle'; did you mean Model?"),
        (["+model.no_such_arg=1"], "model.no_such_arg: own.Model takes no such argument; there are: width, dropout"),
        (["model.no_such_arg=1"], "model.no_such_arg: no such key"),
        (["optimizations.unsloht=true"], "optimizations.unsloht: no such key"),
        (["trainer.steps=many"], "trainer.steps=many: expected a whole number"),
        (["sampler=poool"], "sampler=poool: no such choice; did you mean pool?"),
        (["distributed.device=gpu"], "distributed.device='gpu': expected"),
        (["optimizer.lr=-1"], "optimizer: Invalid learning rate: -1"),
        (["optimizations.freeze=[nothing]"], "optimizations: freeze: 'nothing' matches no parameter"),
        (["data.collate={_target_:own.no}", "+model.widht=1"], "data.collate._target_=own.no: own has no 'no'"),
        (["optimizations.freeze=['*']"], "optimizer: nothing is left to train"),
        (["model._target_=own.Raises"], "model: KeyError('its own mistake')"),
        (["model._target_=sys.exit"], "model: SystemExit()"),
        (["model._target_=broken.Model"], "broken.py:1: RuntimeError: broken at import"),
        (["feeder={_target_:quits.feed}"], "quits.py:2: SystemExit: no GPU"),
        (["data.train.length=0"], "data.train: the dataset is empty"),
        (["data.train=null"], "data.train: nothing is chosen"),
        (
            ["data.train._target_=own.Stream", "~data.train.length"],
            "found Stream without them; add them, or set data.resume=",
        ),
        (["sampler=batched_ordered", "trainer.accumulate=2"], "trainer.accumulate=2: each batch of BatchedOrdered"),
        (["seed=18446744073709551616"], "seed=18446744073709551616: expected at most"),
        (["trainer.clip_norm=nan"], "trainer.clip_norm=nan: expected 0 or more"),
        (["model=null"], "model=null: expected the name of a choice"),
        (["experimnt=digits"], "did you mean experiment?"),
        (["hydra.run.dir=own.py"], "hydra.run.dir=own.py: is a file"),
        (["+engines={a.optimizer: {}}"], "engines.a.optimizer: expected a letter, then letters, digits, '_', '-'"),
        ([f"+engines.{'a' * 201}={{}}"], "200 in all at most (it names files)"),
        (["+engines={a: {}, A: {}}"], "engines: names differ in case alone"),
        (["resume="], "resume=: expected latest"),
        (["feeder={_target_: operator.is_}"], "Model.forward returned bool: expected a scalar loss, a mapping"),
        (["data.eval={a: {_target_: own.Data}}"], "data.eval: expected one dataset, found several; join them"),
        (["data.eval={_target_: null, a: {_target_: own.Data}}"], "; on the command line +data.eval=..."),
        (["data.train={_target_: own.Data, size: 3}"], "data.train.size: no such key"),
        (["~distributed"], "distributed: nothing is chosen; leave ~distributed out"),
        (["optimizer.lr=abc"], "optimizer.lr=abc: expected a number, found a text"),
        (["+model.width=abc"], "width=abc: expected a number, as its default 8, found a text"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_mistake_ends_in_one_message_with_no_folder_left(project, overrides, expected):
    (project.folder / "broken.py").write_text('raise RuntimeError("broken at import")\n')
    (project.folder / "quits.py").write_text('import sys\nsys.exit("no GPU")\n')
    printed = project.run(*overrides, status=2)
    assert expected in printed
    assert "Traceback" not in printed
    assert project.runs == []


def test_a_wrong_return_value_of_a_later_forward_costs_no_step_and_is_told_once(project):
    with (project.folder / "own.py").open("a") as file:
        file.write("\n\ndef feed_six(module, batch):\n    global calls\n    calls += 1\n")
        file.write("    return module(**batch) if calls <= 6 else [1]\n")
    off = ("trainer.eval_every=0", "trainer.save_every=0")
    printed = project.run("hydra.run.dir=run", "feeder={_target_: own.feed_six}", *off, status=1)
    assert printed.count("Model.forward returned list of (int): expected a scalar loss") == 1
    assert "Traceback" not in printed
    assert (project.folder / "run" / "checkpoints" / "step_00000006").is_dir()


INTERRUPTED_AT_AN_IMPORT = """
import os, runpy, signal, sys

number, count = int(sys.argv[1]), 0

def interrupt(event, arguments):
    global count
    count += event == "import"
    if count == number and event == "import":
        os.kill(os.getpid(), signal.SIGINT)

del sys.argv[1]
import runner.control.signals  # Ctrl-C before this is Python's own
sys.addaudithook(interrupt)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("number", [10, 200, 340, 372, 425, 500, 700, 900, 1100])
def test_ctrl_c_at_any_import_ends_with_130_and_leaves_nothing(project, number):
    command = [sys.executable, "-c", INTERRUPTED_AT_AN_IMPORT, str(number), "runner", *project.command[3:]]
    done = subprocess.run(command, cwd=project.folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    assert project.runs == []


def test_ctrl_c_that_a_model_drops_while_it_is_built_ends_the_run_saved(project):
    project.run("model._target_=own.DropsInterrupt", status=130)
    (folder,) = project.runs
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert (folder / "checkpoints" / "step_00000000" / "MANIFEST.json").is_file()


@pytest.mark.parametrize("delay_s", [0.3, 0.7, 1.1, 1.5])
def test_ctrl_c_while_it_starts_ends_with_130_and_leaves_nothing_half_made(project, delay_s):
    process = project.start_afresh("trainer.eval_at_start=false", "+data.train.sleep_s=0.1")
    time.sleep(delay_s)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130 or (process.returncode == -signal.SIGINT and not printed.strip()), printed
    assert all((folder / "run.json").is_file() for folder in project.runs)


def test_a_mistake_leaves_what_lay_in_the_folder_alone(project):
    folder = project.folder / "mine"
    folder.mkdir()
    (folder / "log.txt").write_text("my own notes")
    project.run("hydra.run.dir=mine", "optimizer.lr=-1", status=2)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"log.txt": "my own notes"}


def test_a_sweep_tells_each_job_that_fails_and_does_the_others(project):
    printed = project.run("-m", "trainer.steps=2,0", "trainer.clip_norm=1,-1", status=2)
    lines = printed.splitlines()
    wrong_norm, wrong_steps = "trainer.clip_norm=-1.0: expected 0 or more", "trainer.steps=0: expected 1 or more"
    assert "job 1 (trainer.steps=2 trainer.clip_norm=-1) refused: " + wrong_norm in lines
    assert "job 2 (trainer.steps=0 trainer.clip_norm=1) refused: " + wrong_steps in lines
    assert [line.split()[:4] for line in lines[-5:]] == [
        ["job", "trainer.steps", "trainer.clip_norm", "status"],
        ["0", "2", "1", "finished"],
        ["1", "2", "-1", "refused"],
        ["2", "0", "1", "refused"],
        ["3", "0", "-1", "refused"],
    ]
    assert lines[-2].endswith(wrong_steps)
    assert lines[-1].endswith(f"{wrong_steps}; {wrong_norm}")
    assert "Traceback" not in printed
    (folder,) = project.runs
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


def test_a_job_of_a_sweep_whose_model_raises_is_told_in_one_line_and_its_log_has_the_traceback(project):
    failing = "feeder={_target_: own.fail},null"
    printed = project.run("-m", failing, "trainer.steps=2", "hydra.sweep.dir=sweep", status=1)
    (log,) = (path for path in project.folder.glob("sweep/0-*/log.txt"))
    told = f"RuntimeError: the model's own mistake; see {log}"
    assert [line for line in printed.splitlines() if "the model's own mistake" in line] == [
        f"job 0 (feeder={{_target_:own.fail}}) failed: {told}",
        next(line for line in printed.splitlines() if line.startswith("0 ")),
    ]
    assert "Traceback" not in printed
    assert 'own.py", line' in log.read_text()
    (record,) = (json.loads(path.read_text()) for path in project.folder.glob("sweep/1-*/run.json"))
    assert record["status"] == "finished"


def test_a_refused_resume_leaves_the_run_as_it_was(project):
    project.run("hydra.run.dir=run", typed="quit@5\n")
    folder = project.folder / "run"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "log.txt"}
    for change in ("seed=5", "optimizer.lr=-1", "model.no=1", "+model.width=99"):
        project.run("resume=run", change, status=2)
        assert {path: path.read_bytes() for path in before} == before
    project.run("resume=run")


def test_going_on_from_an_earlier_checkpoint_and_dying_loses_no_number(project):
    project.run("hydra.run.dir=run")
    project.run("hydra.run.dir=whole")
    fail = ("feeder={_target_: own.fail}", "resume_allow_changes=true", "trainer.eval_at_start=false")
    project.run("resume=run/checkpoints/step_00000004", *fail, status=1)
    project.run("resume=run", "feeder=null", "resume_allow_changes=true", "allow_targets=[own]")
    assert_same_run(project.folder / "whole", project.folder / "run", 12)


def test_several_engines_may_leave_out_what_the_others_have(project):
    measured = "{optimizer: null, feeder: {_target_: own.feed}}"
    project.run("+engines.a={}", "+engines.teacher={optimizer: null}", f"+engines.measured={measured}",
        "hydra.run.dir=run")  # fmt: skip
    lines = read_metrics(project.folder / "run")
    assert "train/a/lr" in lines[1]
    assert "train/measured/loss" in lines[1]
    assert "eval/measured/loss" in lines[0]
    assert not any("teacher" in name for line in lines for name in line)
    assert "train/teacher/lr" not in lines[1]
    saved = [io.load(project.folder / "run" / "checkpoints" / f"step_{n:08d}" / "teacher.safetensors") for n in (4, 12)]
    assert_equal(*saved)


def test_all_mistakes_of_targets_are_told_at_once(project):
    printed = project.run("+model.widht=1", "data.collate={_target_:own.no}", status=2)
    assert "did you mean width?" in printed
    assert "own has no 'no'" in printed


def test_an_error_in_the_users_model_shows_where_and_marks_the_run_failed(project):
    printed = project.run("feeder={_target_:own.fail}", status=1)
    assert 'own.py", line' in printed
    (folder,) = project.runs
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"
    assert "the model's own mistake" in (folder / "log.txt").read_text()


def test_a_feeder_that_is_a_function_is_called_with_module_and_batch(project):
    project.run("trainer.steps=2", "feeder={_target_:own.feed}")
    (folder,) = project.runs
    assert "train/error" not in read_metrics(folder)[1]


def test_a_folder_that_holds_a_run_is_not_overwritten(project):
    project.run("hydra.run.dir=run", "trainer.steps=2")
    before = (project.folder / "run" / "metrics.jsonl").read_text()
    printed = project.run("hydra.run.dir=run", "trainer.steps=2", status=2)
    assert "holds a run already; resume=run" in printed
    assert (project.folder / "run" / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_a_sweep_leaves_a_complete_folder_a_job(project):
    project.run("-m", "sampler=pool,random", "seed=1,2", "trainer.steps=3")
    names = [folder.name for folder in project.runs]
    swept = [f"sampler={sampler},seed={seed}" for sampler in ("pool", "random") for seed in (1, 2)]
    assert names == [f"{number}-{each}" for number, each in enumerate(swept)]
    losses = set()
    for folder in project.runs:
        assert json.loads((folder / "run.json").read_text())["status"] == "finished"
        assert (folder / "checkpoints" / "step_00000003" / "MANIFEST.json").is_file()
        assert [line["step"] for line in read_metrics(folder) if "train/loss" in line] == [1, 2, 3]
        assert (folder / "log.txt").read_text().count("Finished at step 3") == 1
        losses.add(read_metrics(folder)[-2]["train/loss"])
    assert len(losses) == 4


def test_a_sweep_job_with_a_mistake_leaves_no_folder_and_the_others_run(project):
    printed = project.run("-m", "+model.width=4,0x", "trainer.steps=2", "model._target_=own.Model,own.No", status=2)
    assert "own has no 'No'" in printed
    assert len(project.runs) < 4


OVERTRAINED = """

class Over(Model):
    # best after `best` steps; at step 4 the disk refuses, where it is asked to
    def __init__(self, best=4, refuses=False):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.best, self.refuses = best, refuses

    def forward(self, x, y):
        if self.refuses and self.steps == 4 and not self.training:
            os.rename("run/checkpoints", "run/away")
            open("run/checkpoints", "w").close()
            self.refuses = False
        if self.training and os.path.isdir("run/away") and self.steps == 5:
            os.remove("run/checkpoints")
            os.rename("run/away", "run/checkpoints")
        self.steps += self.training
        return {**super().forward(x, y), "score": -((self.steps - self.best) ** 2)}
"""
KEEPS_BEST = ["model._target_=own.Over", "trainer.eval_every=2", "trainer.save_every=12", "trainer.keep_last=1"]
KEEPS_BEST += ["trainer.keep_best=1", "trainer.best_metric=eval/score", "trainer.best_mode=max", "allow_targets=[own]"]


def best_of(run):
    """Returns what run.json says is best, once its checkpoint was loaded, and the steps of all checkpoints."""
    best = json.loads((run / "run.json").read_text())["best"]
    if best is not None and best["step"] is not None:
        assert load(run / "checkpoints" / f"step_{best['step']:08d}")["model"]["steps"] == best["step"]
    return best, sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))


@pytest.fixture
def over_project(project):
    with open(project.folder / "own.py", "a") as file:
        file.write(OVERTRAINED)
    return project


@pytest.mark.parametrize("best", [0, 4, 12])
def test_the_best_evaluation_is_saved_at_its_step(over_project, best):
    over_project.run(*KEEPS_BEST, f"+model.best={best}", "hydra.run.dir=run", "trainer.save_every=0")
    found, steps = best_of(over_project.folder / "run")
    assert found == {"name": "eval/score", "value": 0.0, "step": best}
    assert steps == [best]


def test_a_best_checkpoint_that_the_disk_refused_is_named_nowhere_and_the_next_best_is_saved(over_project):
    printed = over_project.run(*KEEPS_BEST, "+model.best=5", "+model.refuses=true", "hydra.run.dir=run")
    assert "The checkpoint of step 4 could not be written" in printed
    found, steps = best_of(over_project.folder / "run")
    assert found == {"name": "eval/score", "value": -1.0, "step": 6}
    assert steps == [6, 12]


def test_a_best_checkpoint_that_is_gone_is_not_named(over_project):
    over_project.run(*KEEPS_BEST, "hydra.run.dir=run")
    run = over_project.folder / "run"
    assert best_of(run) == ({"name": "eval/score", "value": 0.0, "step": 4}, [4, 12])
    over_project.copy("run", "other")
    shutil.rmtree(run / "checkpoints" / "step_00000004")  # by hand
    over_project.run("resume=run", "trainer.steps=14", "allow_targets=[own]")
    assert best_of(run) == ({"name": "eval/score", "value": -64.0, "step": 12}, [12, 14])
    over_project.run("resume=other", "trainer.steps=14", "trainer.keep_best=0", "allow_targets=[own]")
    assert best_of(over_project.folder / "other") == ({"name": "eval/score", "value": 0.0, "step": None}, [14])
    over_project.run("resume=run/checkpoints/step_00000012", "trainer.steps=12", "allow_targets=[own]")
    assert best_of(run) == ({"name": "eval/score", "value": -64.0, "step": 12}, [12])


def make_old(run, sign):
    """Makes each checkpoint's metric what older versions stored: a number, negated where higher is better."""
    for path in (run / "checkpoints").glob("step_*/MANIFEST.json"):
        manifest = io.read_json(path)
        del manifest["crc32c"]
        manifest["metric"] = manifest["metric"] and sign * manifest["metric"]["value"]
        io.write_json(_with_checksum(manifest), path)


RESUMED = ["resume=run", "trainer.steps=18", "allow_targets=[own]"]


@pytest.mark.parametrize("is_old", [False, True])
def test_with_another_mode_the_best_is_that_of_the_checkpoints_by_it(over_project, is_old):
    all_kept = ["trainer.best_mode=min", "trainer.keep_last=0", "trainer.save_every=2"]
    over_project.run(*KEEPS_BEST, *all_kept, "hydra.run.dir=run")
    run = over_project.folder / "run"
    assert best_of(run)[0] == {"name": "eval/score", "value": -64.0, "step": 12}
    if is_old:
        make_old(run, 1)
    over_project.run(*RESUMED, "trainer.best_mode=max", "trainer.keep_last=1", "trainer.keep_best=2")
    found, steps = best_of(run)
    assert found == {"name": "eval/score", "value": 0.0, "step": 4}
    assert steps == [4, 6, 18]
    over_project.run(*RESUMED, "trainer.best_mode=min")
    assert best_of(run)[0] == {"name": "eval/score", "value": -196.0, "step": 18}


@pytest.mark.parametrize("is_old", [False, True])
def test_with_another_metric_the_best_is_found_anew_and_told(over_project, is_old):
    over_project.run(*KEEPS_BEST, "hydra.run.dir=run")
    run = over_project.folder / "run"
    if is_old:
        make_old(run, -1)
    by_loss = ["trainer.best_metric=eval/loss", "trainer.best_mode=min"]
    printed = over_project.run(*RESUMED, *by_loss)
    assert printed.count("now found by eval/loss: that by eval/score no longer counts") == 1
    losses = {line["step"]: line["eval/loss"] for line in read_metrics(run) if "eval/loss" in line}
    step = min((step for step in losses if step > 12), key=losses.__getitem__)
    found, steps = best_of(run)
    assert found == {"name": "eval/loss", "value": losses[step], "step": step}
    assert steps == sorted({step, 18})


UNSAVEABLE = """

from collections import Counter, defaultdict
import pathlib


class Placed(Model):
    def get_extra_state(self):
        return pathlib.Path(".")


class Kept(Model):
    # with state of many kinds, some of which an update makes
    def __init__(self):
        super().__init__()
        self.counts, self.seen = Counter(), defaultdict(set)
        self.register_buffer("wide", torch.zeros(1, 3).expand(4, 3))

    def get_extra_state(self):
        return {"counts": self.counts, "seen": self.seen, "number": numpy.int16(3), "size": torch.Size([2])}

    def set_extra_state(self, state):
        self.counts, self.seen = state["counts"], state["seen"]

    def forward(self, x, y):
        if self.training:
            self.counts[len(x)] += 1
            self.seen[float(y.numel())].add((1, "a"))
        return super().forward(x, y)


class Odd(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["seen"] = range(3)


class Drawn:
    # its state is a generator's
    def __init__(self, length):
        self.length, self.generator, self.left = length, torch.Generator(), []

    def __iter__(self):
        while self.left or len(self.left) == 0:
            if not self.left:
                self.left = torch.randperm(self.length, generator=self.generator).tolist()
            while self.left:
                yield self.left.pop()

    def state_dict(self):
        return {"generator": self.generator.get_state(), "left": tuple(self.left)}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])
        self.left = list(state["left"])
"""


@pytest.fixture
def odd_project(project):
    with open(project.folder / "own.py", "a") as file:
        file.write(UNSAVEABLE)
    choices = {
        "optimizer/odd": "{_target_: own.Odd, lr: 0.1}",
        "sampler/drawn": "{_target_: own.Drawn}",
        "scheduler/stairs": "{_target_: torch.optim.lr_scheduler.MultiStepLR, milestones: [2, 4, 9], gamma: 0.5}",
    }
    for choice, text in choices.items():
        path = project.folder / "conf" / f"{choice}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    edited = project.folder / "conf" / "experiment" / "mine.yaml"
    edited.write_text(edited.read_text().replace("scheduler: {warmup_steps: 3}\n", ""))
    return project


def test_state_that_cannot_be_saved_is_told_before_the_first_step(odd_project):
    printed = odd_project.run("model._target_=own.Placed", status=2)
    assert 'model: its state can\'t be saved: value["_extra_state"] is a pathlib.PosixPath' in printed
    assert odd_project.runs == []


def test_state_that_an_optimizer_makes_in_the_first_step_is_told_then(odd_project):
    printed = odd_project.run("optimizer=odd", "scheduler=constant", "hydra.run.dir=run", status=1)
    place = 'value["optimizer"]["state"][0]["seen"]'
    assert f"model.optimizer: its state can't be saved: {place} is a builtins.range" in printed
    assert "Traceback" not in printed
    record = json.loads((odd_project.folder / "run" / "run.json").read_text())
    assert record["last_step"] == 0
    assert not (odd_project.folder / "run" / "checkpoints").exists()


@pytest.mark.parametrize("format", ["sft", "pt"])
def test_state_of_any_kind_that_is_stored_goes_on_as_if_never_cut(odd_project, format):
    own = ["model._target_=own.Kept", "sampler=drawn", "scheduler=stairs", "trainer.eval_every=0"]
    own += [f"checkpoint.format={format}"]
    odd_project.run(*own, "hydra.run.dir=whole")
    odd_project.run(*own, "hydra.run.dir=cut", "trainer.steps=7")
    odd_project.run("resume=cut", "trainer.steps=12", "allow_targets=[own]")
    whole, cut = (load(odd_project.folder / run / "checkpoints" / "step_00000012") for run in ("whole", "cut"))
    assert_equal(whole, cut)
    assert whole["model"]["_extra_state"]["counts"].total() == 12
    assert read_untimed_metrics(odd_project.folder / "whole") == read_untimed_metrics(odd_project.folder / "cut")


def test_engines_named_as_the_runners_own_files_are_saved_resumed_and_exported(project):
    names = ["trainer", "structure", "MANIFEST"]
    engines = [f"+engines.{name}={{}}" for name in names]
    project.run(*engines, "trainer.steps=6", "hydra.run.dir=whole")
    project.run(*engines, "trainer.steps=4", "hydra.run.dir=cut")
    project.run("resume=cut", "trainer.steps=6", "trainer.export_every=6")
    whole, cut = (load(project.folder / run / "checkpoints" / "step_00000006") for run in ("whole", "cut"))
    assert whole.keys() == {"trainer.json", *names, *(f"{name}.optimizer" for name in names)}
    counts = [state["trainer.json"].pop("numbers")["lines"] for state in (whole, cut)]
    assert counts[1] == counts[0] + 1  # the evaluation at the end of four steps
    assert_equal(whole, cut)
    exports = sorted(path.stem for path in (project.folder / "cut" / "exports").iterdir())
    assert exports == sorted(names)


@pytest.mark.slow
def test_two_engines_of_different_optimizers_train_side_by_side(project):
    (project.folder / "conf" / "experiment" / "two.yaml").write_text(
        "# @package _global_\ndefaults: [mine]\nname: two\nengines:\n"
        "  ar-a: {}\n"
        "  ar-b: {optimizer: {_target_: torch.optim.SGD, lr: 0.05},\n"
        "    scheduler: {_target_: runner.engines.optim.schedulers.constant}}\n"
    )
    project.run("experiment=two", "hydra.run.dir=two")
    line = [line for line in read_metrics(project.folder / "two") if "train/ar-a/loss" in line][-1]
    assert line["train/ar-b/lr"] == 0.05
    assert line["train/ar-a/loss"] != line["train/ar-b/loss"]
    names = {p.name for p in (project.folder / "two" / "checkpoints" / "step_00000012").iterdir()}
    assert {"ar-a.safetensors", "ar-a.optimizer.safetensors", "ar-b.safetensors", "ar-b.optimizer.safetensors"} <= names
