import json
from types import SimpleNamespace

import pytest
from conftest import read_metrics
from own_callbacks import RECORDER, add_callbacks
from run_comparison import assert_same_run

from runner.callbacks.group import CallbackError, CallbackGroup, check_callback
from runner.callbacks.run_view import RunView


class Base:
    def on_start(self, view):
        pass


class View:
    def enter(self, name, hook):
        self.entered = name, hook


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"on_evaluat": print}, r"Mine.on_evaluat: no such hook; did you mean on_evaluate\?"),
        ({"on_start": print, "on_fit_end": print}, "Mine.on_fit_end: no such hook; there are|did you mean"),
        ({}, "expected an object with one of the methods on_start, .*; found Mine, which has none"),
        ({"on_start": print, "state_dict": dict}, "Mine: expected both state_dict and load_state_dict, or neither"),
    ],
)
def test_a_callback_with_wrong_methods_is_an_error_that_names_them(methods, message):
    with pytest.raises(TypeError, match=message):
        check_callback(type("Mine", (), methods)())


def test_hooks_are_called_in_order_and_none_after_one_has_failed():
    calls = []

    class Fails:
        def on_start(self, view):
            calls.append(view.entered)
            raise ValueError("its own mistake")

    class Counts(Base):
        def on_start(self, view):
            calls.append(view.entered)

    view = View()
    group = CallbackGroup({"first": Counts(), "second": Fails(), "third": Counts()})
    with pytest.raises(CallbackError, match=r"callbacks.second.on_start: ValueError: its own mistake") as raised:
        group.call("on_start", view)
    assert isinstance(raised.value.__cause__, ValueError)
    group.call("on_start", view)
    assert calls == [("first", "on_start"), ("second", "on_start")]
    assert group.defines("on_start")
    assert not group.defines("on_save")


def test_a_state_that_does_not_fit_names_its_callback():
    class Strict(Base):
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            raise KeyError("count")

    group = CallbackGroup({"strict": Strict(), "plain": Base()})
    assert group.state_dict() == {"strict": {}}
    with pytest.raises(ValueError, match=r"callbacks\.strict: its saved state does not fit: KeyError"):
        group.load_state_dict({"strict": {}})
    notes = CallbackGroup({"plain": Base()}).load_state_dict({"gone": {}})
    assert notes == ["callbacks.gone: it is not configured any more; its saved state is dropped"]


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("log", [{"step": 1}], "'step' is a name of metrics.jsonl's own"),
        ("log", [{"a": "1"}], "'a' is a str; expected a number"),
        ("log", [{"a": 10**400}], "'a' is an integer that is too large"),
        ("text", ["a", 1], "'a' is a int; expected a text"),
    ],
)
def test_what_a_view_cannot_log_is_an_error_in_the_callback(method, arguments, message):
    run = SimpleNamespace(engines={}, folder=None, loop=SimpleNamespace(step=1), tracker=None)
    with pytest.raises((TypeError, ValueError), match=f"^{method}: {message}"):
        getattr(RunView(run), method)(*arguments)


def calls_of(project, rank=0):
    path = project.folder / (f"calls.txt.{rank}" if rank else "calls.txt")
    lines = path.read_text().splitlines()
    path.unlink()
    return lines


SHORT = ["trainer.steps=4", "trainer.save_every=2", "trainer.eval_every=4", "trainer.log_every=2"]


def test_each_hook_is_called_where_it_belongs_in_a_session_and_in_one_that_resumes(project):
    add_callbacks(project)
    numbers = "['eval/error', 'eval/loss', 'eval/number']"
    project.run(*SHORT, RECORDER, "hydra.run.dir=run")
    assert calls_of(project) == [
        "0 start False 0",
        f"0 evaluate {numbers}",
        "1 step [] False",
        "2 step ['train/error'] False",
        "2 save",
        "3 step [] False",
        "4 step ['train/error'] True",
        f"4 evaluate {numbers}",
        "4 save",
        "4 end finished",
    ]
    project.run("resume=run", "trainer.steps=5")
    assert calls_of(project)[:2] == ["4 start True 32", "5 step ['train/error'] True"]
    counts = [line["mine/count"] for line in read_metrics(project.folder / "run") if "mine/count" in line]
    assert counts == [1, 2, 3, 4, 5]  # by its state


def test_a_skipped_step_calls_no_hook(project):
    add_callbacks(project)
    settings = ["trainer.on_nonfinite=skip", "feeder={_target_: own.fail_at_call}", "trainer.eval_every=0"]
    process = project.start(
        *SHORT, *settings, "+callbacks.seen={_target_: own.Skipped}", environment={"OWN_FAILURE": "nan@2"}
    )
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    assert "seen [1, 3, 4]" in printed


@pytest.mark.parametrize(
    ("step", "hook"),
    [
        (6, "step"),
        pytest.param(6, "evaluate", marks=pytest.mark.slow),
        (4, "save"),
        pytest.param(12, "end", marks=pytest.mark.slow),
    ],
)
def test_an_error_names_the_callback_and_loses_nothing(project, step, hook):
    add_callbacks(project)
    project.run(RECORDER, "hydra.run.dir=whole")
    failing = f"+callbacks.recorder={{_target_: own.Recorder, fails_at: [{step}, {hook}]}}"
    printed = project.run(failing, "hydra.run.dir=run", status=1)
    run = project.folder / "run"
    assert f"callbacks.recorder.on_{hook}: ValueError: its own mistake" in printed
    assert 'raise ValueError("its own mistake")' in printed
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["last_step"]) == ("failed", step)
    assert (run / "checkpoints" / f"step_{step:08d}").is_dir()
    project.run("resume=run", "callbacks.recorder.fails_at=null")
    assert_same_run(run, project.folder / "whole", 12)


def test_requests_are_done_at_the_same_step_and_a_stop_ends_the_run_as_its_last_step(project):
    add_callbacks(project)
    requests = "{step@1: save, step@2: evaluate, evaluate@2: save, step@3: stop}"
    project.run(*SHORT, f"+callbacks.recorder={{_target_: own.Recorder, requests: {requests}}}", "hydra.run.dir=run")
    calls = [line.split("[")[0].strip() for line in calls_of(project)]
    assert calls[2:] == [
        "1 step", "1 save", "2 step", "2 evaluate", "2 save", "3 step", "3 evaluate", "3 save", "3 end finished",
    ]  # fmt: skip
    record = json.loads((project.folder / "run" / "run.json").read_text())
    assert (record["status"], record["reason"]) == ("finished", "callbacks.recorder: enough")


def test_a_late_request_is_an_error(project):
    add_callbacks(project)
    late = "+callbacks.recorder={_target_: own.Recorder, requests: {save@2: evaluate}}"
    assert "on_save: too late for a request" in project.run(*SHORT, late, status=1)


@pytest.mark.parametrize("only_rank", [pytest.param("null", marks=pytest.mark.slow), "1"])
def test_a_request_of_one_rank_holds_for_all(project, only_rank):
    add_callbacks(project)
    requests = "{step@1: save, step@2: stop}"
    recorder = f"+callbacks.recorder={{_target_: own.Recorder, requests: {requests}, only_rank: {only_rank}}}"
    project.run(
        *SHORT, "trainer.steps=9", "trainer.save_every=100", recorder, "distributed=ddp",
        "distributed.nproc_per_node=2", "hydra.run.dir=run", forks_workers=True,
    )  # fmt: skip
    calls = [[line.split("[")[0].strip() for line in calls_of(project, rank)] for rank in (0, 1)]
    assert calls[0] == calls[1]
    assert calls[0][2:] == ["1 step", "2 step", "2 save", "3 step", "3 evaluate", "3 save", "3 end finished"]
    assert (project.folder / "run" / "checkpoints" / "step_00000003").is_dir()


def test_an_error_on_one_rank_names_the_callback_and_saves(project):
    add_callbacks(project)
    path = project.folder / "own.py"
    path.write_text(path.read_text().replace("== self.fails_at:", "== self.fails_at and rank == 1:"))
    failing = "+callbacks.recorder={_target_: own.Recorder, fails_at: [4, evaluate]}"
    printed = project.run(
        *SHORT, failing, "distributed=ddp", "distributed.nproc_per_node=2", "hydra.run.dir=run",
        forks_workers=True, status=1,
    )  # fmt: skip
    assert "callbacks.recorder.on_evaluate: ValueError: its own mistake" in printed
    assert (project.folder / "run" / "checkpoints" / "step_00000004").is_dir()


def test_callbacks_may_come_and_go_on_resume_and_each_change_is_printed(project):
    add_callbacks(project)
    project.run(*SHORT, RECORDER, "hydra.run.dir=run")
    printed = project.run("resume=run", "callbacks=[early_stopping]", "trainer.steps=5")
    assert "callbacks.recorder: it is not configured any more; its saved state is dropped" in printed
    assert "callbacks.early_stopping: the checkpoint has no state of it; it starts anew" in printed
    assert "callbacks.early_stopping: (none) -> {_target_: runner.callbacks.early_stopping.EarlyStopping" in printed


def test_a_state_that_cannot_be_saved_names_its_callback_before_the_first_step(project):
    add_callbacks(project)
    path = project.folder / "own.py"
    path.write_text(path.read_text() + UNSAVEABLE)
    printed = project.run("+callbacks.odd={_target_: own.Unsaveable}", status=2)
    assert 'callbacks.odd: its state can\'t be saved: value["f"] is a builtins.builtin_function_or_method' in printed
    assert project.runs == []


UNSAVEABLE = """

class Unsaveable(Recorder):
    def state_dict(self):
        return {"f": print}
"""
