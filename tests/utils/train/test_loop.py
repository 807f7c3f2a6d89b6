from types import SimpleNamespace

import pytest
import torch

from runner.utils.distributed import seed_all
from runner.utils.train import Loop, Stop
from runner.utils.train.failures import FailurePolicy, TrainingStopped
from runner.utils.train.loop import Action


class Counting:
    """An EngineGroup that records the calls of the loop and draws one random number per micro-step."""

    device = torch.device("cpu")
    tokens = 0
    is_updating = False

    def __init__(self):
        self.batches, self.drawn = [], []
        self.num_steps = self.num_discarded = 0
        self.faults, self.late_faults, self.stops = {}, {}, False

    def seed(self, seed, shared):
        seed_all(seed, self.device)

    def begin_step(self, step):
        pass

    def micro_step(self, batch, weight=1.0):
        self.batches.append(batch)
        self.drawn.append(torch.rand(()).item())

    def step(self, poll_faults=dict):
        self.num_steps += 1
        return self.faults.pop(self.num_steps, {})

    def discard(self):
        self.num_discarded += 1

    def is_stopped_by(self, faults):
        return self.stops

    def find_late_faults(self):
        return self.late_faults

    def take_metrics(self):
        return {"loss": float(len(self.batches))}


class Numbers:
    weight = 1.0

    def __init__(self, start=0):
        self.num_samples_total = start

    def __next__(self):
        self.num_samples_total += 1
        return self.num_samples_total

    def position(self):
        return self.num_samples_total

    def seek(self, position):
        self.num_samples_total = position


class Typed:
    """A CommandSource with commands by the step at which they are due."""

    def __init__(self, **by_step):
        self.by_step = {int(key[1:]): value for key, value in by_step.items()}

    def due(self, step):
        return [SimpleNamespace(name=n, argument=a) for n, a in self.by_step.pop(step, [])]


def make_loop(steps=10, **settings):
    done, logged = [], []
    every = settings.pop("every", {})
    actions = {name: lambda loop, _, name=name: loop.request_action(name) for name in every}
    settings["commands"] = actions | settings.get("commands", {})
    loop = Loop(
        Counting(),
        Numbers(),
        steps=steps,
        log=lambda step, values: logged.append((step, values)),
        actions={name: Action(lambda n=name: done.append((n, loop.step)), number) for name, number in every.items()},
        **settings,
    )
    return loop, done, logged


def test_each_step_runs_its_micro_steps():
    loop, _, _ = make_loop(steps=3, accumulate=4)
    assert loop.run() == "finished"
    assert loop.engines.batches == list(range(1, 13))


def test_actions_run_at_their_interval_and_at_the_end_in_order():
    loop, done, _ = make_loop(steps=7, every={"eval": 3, "save": 2, "export": 0})
    loop.run()
    assert done == [("save", 2), ("eval", 3), ("save", 4), ("eval", 6), ("save", 6), ("eval", 7), ("save", 7)]


def test_the_last_boundary_runs_an_action_once():
    loop, done, _ = make_loop(steps=4, every={"save": 2})
    loop.run()
    assert done == [("save", 2), ("save", 4)]


def test_metrics_are_logged_at_their_interval_and_at_the_end():
    loop, _, logged = make_loop(steps=7, log_every=3)
    loop.run()
    assert [step for step, _ in logged] == [3, 6, 7]
    assert logged[0][1]["train/loss"] == 3.0
    assert {"train/step_time_s", "train/samples_per_s", "train/memory_gb"} <= logged[0][1].keys()


def test_log_every_zero_logs_nothing():
    loop, _, logged = make_loop(steps=3, log_every=0)
    loop.run()
    assert logged == []


def test_random_numbers_are_a_function_of_seed_step_micro_step_and_rank(monkeypatch):
    def drawn(**settings):
        loop, _, _ = make_loop(**({"steps": 4, "accumulate": 2} | settings))
        loop.run()
        return loop.engines.drawn

    first = drawn(seed=1)
    assert len(set(first)) == 8
    torch.rand(17)  # numbers drawn elsewhere do not matter
    assert drawn(seed=1) == first
    assert not set(drawn(seed=2)) & set(first)
    monkeypatch.setattr("runner.utils.distributed.rank", lambda: 1)
    assert not set(drawn(seed=1)) & set(first)


def test_a_step_can_be_replayed_alone():
    loop, _, _ = make_loop(steps=6)
    loop.run()
    later, _, _ = make_loop(steps=6)
    later.load_state_dict({"step": 4, "skipped": 0, "owed": []})
    later.run()
    assert later.engines.drawn == loop.engines.drawn[4:]


def test_actions_between_steps_do_not_change_the_random_numbers_of_steps():
    plain, _, _ = make_loop(steps=5)
    plain.run()
    busy, _, _ = make_loop(steps=5)
    busy.schedule.actions["eval"] = Action(lambda: torch.rand(100), 1)
    busy.run()
    assert busy.engines.drawn == plain.engines.drawn


def test_handlers_of_commands_are_called_with_the_loop_at_their_boundary():
    called = []
    queue = Typed(_2=[("save", None), ("lr", 0.5)])
    loop, done, _ = make_loop(
        steps=3, every={"save": 0}, queue=queue, commands={"lr": lambda loop, lr: called.append((loop.step, lr))}
    )
    loop.run()
    assert done == [("save", 2)]
    assert called == [(2, 0.5)]


def test_a_typed_action_that_is_also_due_runs_once():
    loop, done, _ = make_loop(steps=4, every={"save": 2}, queue=Typed(_2=[("save", None)]))
    loop.run()
    assert done == [("save", 2), ("save", 4)]


def test_stop_saves_once_and_returns_its_reason():
    def end(loop, _):
        raise Stop("quit")

    loop, done, _ = make_loop(
        steps=9, every={"eval": 2, "save": 5}, queue=Typed(_4=[("quit", None)]), commands={"quit": end}
    )
    assert loop.run() == "quit"
    assert (loop.step, done) == (4, [("eval", 2), ("save", 4)])


def test_a_stop_request_ends_the_loop_at_the_next_boundary():
    loop, done, _ = make_loop(steps=9, every={"save": 0})
    loop.engines.micro_step = lambda batch, weight: loop.stop("interrupted") if batch == 3 else None
    assert loop.run() == "interrupted"
    assert done == [("save", 3)]


def test_a_finished_loop_that_is_resumed_does_nothing():
    loop, done, _ = make_loop(steps=5, every={"save": 1})
    loop.load_state_dict({"step": 5, "skipped": 0, "owed": []})
    assert loop.run() == "finished"
    assert (done, loop.engines.batches) == ([], [])


def test_the_time_of_actions_does_not_count_as_training(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("runner.utils.train.loop.time.perf_counter", lambda: now[0])
    loop, _, logged = make_loop(steps=4, log_every=2)

    def pass_time(seconds):
        now[0] += seconds

    loop.schedule.actions["eval"] = Action(lambda: pass_time(100.0), 1)
    loop.engines.micro_step = lambda batch, weight: pass_time(1.0)
    loop.run()
    assert [values["train/step_time_s"] for _, values in logged] == pytest.approx([1.0, 1.0])


def out_of_memory(at, times=1):
    """Makes the `at`-th micro-step run out of memory."""
    calls = []

    def micro_step(batch, weight):
        calls.append(batch)
        if at <= len(calls) < at + times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return micro_step, calls


def test_a_step_out_of_memory_is_discarded_saved_before_and_ends_the_loop():
    loop, done, logged = make_loop(steps=9, accumulate=2, log_every=1, every={"save": 0, "eval": 1})
    loop.engines.micro_step, _ = out_of_memory(at=6)
    with pytest.raises(TrainingStopped, match=r"Out of memory in step 3: .*Tried to allocate 2.00 GiB"):
        loop.run()
    assert (loop.step, loop.engines.num_discarded, loop.batches.num_samples_total) == (2, 1, 4)
    assert done == [("eval", 1), ("eval", 2), ("save", 2)]
    assert [step for step, _ in logged] == [1, 2]


def test_a_step_out_of_memory_can_be_skipped_with_its_batches():
    warned = []
    loop, _, _ = make_loop(steps=4, accumulate=2, policy=FailurePolicy(on_oom="skip"), warn=warned.append)
    loop.engines.micro_step, calls = out_of_memory(at=3)
    assert loop.run() == "finished"
    assert calls == [1, 2, 3, 5, 6, 7, 8]
    assert (loop.step, loop.step_runner.num_skipped) == (4, 1)
    assert "Step 2 (samples 2 to 3 of the stream) went wrong. Out of memory" in warned[0]


def test_memory_that_runs_out_in_an_update_ends_the_loop_without_a_save():
    loop, done, _ = make_loop(steps=4, every={"save": 0})

    def step(hear):
        loop.engines.is_updating = True
        raise MemoryError

    loop.engines.step = step
    with pytest.raises(TrainingStopped, match="go on from the last checkpoint") as caught:
        loop.run()
    assert not caught.value.is_complete
    assert done == []


class Own(BaseException):
    """An error that `except Exception` does not catch."""


@pytest.mark.parametrize(
    "error",
    [KeyError("no file"), SystemExit(3), KeyboardInterrupt(), KeyboardInterrupt("stop"), GeneratorExit(), Own()],
    ids=repr,
)
@pytest.mark.parametrize("where", ["micro_step", "next", "step", "eval", "log", "due", "save"])
def test_any_error_is_raised_unchanged_after_saving_the_last_complete_step(error, where):
    loop, done, _ = make_loop(steps=9, accumulate=2, log_every=3, every={"eval": 3, "save": 0}, queue=Typed())
    raised_at = {"micro_step": 7, "next": 7, "step": 4, "eval": 1, "log": 1, "due": 3, "save": 1}[where]
    owners = {"next": (Numbers, "__next__"), "log": (loop, "_log_values"), "due": (loop._queue, "due")}
    owner, name = owners.get(where, (loop.engines, where))
    actions, calls = loop.schedule.actions, []

    def failing(original):
        def call(*args):
            calls.append(args)
            if len(calls) == raised_at:
                raise error
            return original(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        if where in actions:
            patch.setitem(actions, where, Action(failing(actions[where].do), 3))
        else:
            patch.setattr(owner, name, failing(getattr(owner, name)))
        with pytest.raises(type(error)) as caught:
            loop.run()
    assert caught.value is error
    assert (loop.step, loop.batches.num_samples_total) == (3, 6)
    assert [name for name, _ in done].count("save") == 1  # a failed save is retried once
    assert loop.engines.num_discarded == (where in ("micro_step", "next", "step"))


@pytest.mark.parametrize("where", ["micro_step", "eval"])
def test_a_signal_that_ends_the_program_at_once_saves_nothing(where):
    loop, done, _ = make_loop(steps=4, every={"eval": 2, "save": 0})

    def end(*args):
        raise KeyboardInterrupt(2)

    if where == "eval":
        loop.schedule.actions["eval"] = Action(end, 2)
    else:
        loop.engines.micro_step = end
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    assert done == []


def test_an_error_in_an_update_is_raised_with_a_note_and_nothing_is_saved():
    loop, done, _ = make_loop(steps=4, every={"save": 0})

    def step(hear):
        loop.engines.is_updating = True
        raise KeyError("mine")

    loop.engines.step = step
    with pytest.raises(KeyError) as caught:
        loop.run()
    assert caught.value.__notes__ == ["Its update was under way: go on from the last checkpoint"]
    assert done == []


def test_a_failing_save_after_an_error_is_reported_and_does_not_hide_the_error():
    warned = []
    loop, _, _ = make_loop(steps=4, every={"save": 0}, warn=warned.append)
    loop.schedule.actions["save"] = Action(lambda: {}["no such part"], 0)
    loop.engines.micro_step = lambda batch, weight: 1 / 0
    with pytest.raises(ZeroDivisionError):
        loop.run()
    assert warned == ["The state of step 0 can't be saved: KeyError('no such part')"]


@pytest.mark.parametrize("num_failures", [1, 2])
def test_a_failed_save_is_retried_once_at_the_end(num_failures):
    warned, saved, errors = [], [], [OSError("busy")] * num_failures

    def save():
        if errors:
            raise errors.pop()
        saved.append(loop.step)

    loop, _, _ = make_loop(steps=4, every={"save": 0}, warn=warned.append)
    loop.schedule.actions["save"] = Action(save, 0)
    loop.stop("interrupted")
    with pytest.raises(OSError, match="busy"):
        loop.run()
    assert saved == [0] * (num_failures == 1)
    assert warned == []  # the error itself is raised


def test_a_step_that_cannot_be_discarded_is_not_saved():
    loop, done, _ = make_loop(steps=4, every={"save": 0})

    def refuse():
        raise RuntimeError("CUDA error: device-side assert triggered")

    loop.engines.micro_step = lambda batch, weight: 1 / 0
    loop.engines.discard = refuse
    with pytest.raises(RuntimeError, match="device-side assert") as caught:
        loop.run()
    assert isinstance(caught.value.__context__, ZeroDivisionError)
    assert caught.value.__notes__ == [
        "The step can't be discarded, and nothing is saved: go on from the last checkpoint"
    ]
    assert done == []


def test_batches_that_fail_while_a_step_is_skipped_leave_the_position():
    loop, done, _ = make_loop(steps=4, every={"save": 0}, policy=FailurePolicy(on_oom="skip"))
    loop.engines.micro_step, _ = out_of_memory(at=3)
    given = loop.batches.__class__.__next__

    class Failing(Numbers):
        def __next__(self):
            if self.num_samples_total == 2 and loop.engines.num_discarded:
                raise KeyError("no file")
            return given(self)

    loop.batches = loop.step_runner._batches = Failing()
    with pytest.raises(KeyError):
        loop.run()
    assert (loop.step, loop.batches.num_samples_total, done) == (2, 2, [("save", 2)])


@pytest.mark.parametrize("stops", [True, False])
def test_a_nonfinite_step_stops_the_loop_or_is_counted(stops):
    warned = []
    loop, done, logged = make_loop(steps=5, log_every=1, every={"save": 0}, warn=warned.append)
    loop.engines.faults, loop.engines.stops = {3: {"model": "its loss is nan"}}, stops
    if stops:
        with pytest.raises(
            TrainingStopped, match=r"Step 3 \(samples 2 to 2 of the stream\) went wrong. model: its loss is nan"
        ):
            loop.run()
        assert (loop.step, loop.engines.num_discarded, loop.batches.num_samples_total) == (2, 1, 2)
        assert done == [("save", 2)]
    else:
        assert loop.run() == "finished"
        assert (loop.step, loop.step_runner.num_skipped, loop.engines.num_discarded) == (5, 1, 0)
        assert len(warned) == 1
        assert [step for step, _ in logged] == [1, 2, 3, 4, 5]


def test_the_limit_on_skipped_steps_ends_the_loop_at_a_boundary():
    loop, done, logged = make_loop(
        steps=9, log_every=1, every={"eval": 1, "save": 0}, policy=FailurePolicy(max_skips=1)
    )
    loop.engines.faults = {2: {"model": "nan"}, 4: {"model": "nan"}}
    with pytest.raises(TrainingStopped, match="More steps went wrong than the 1 that may be left out"):
        loop.run()
    assert loop.state_dict() == {"step": 4, "skipped": 2, "owed": []}
    assert [step for step, _ in logged] == [1, 2, 3, 4]
    assert done[-2:] == [("eval", 4), ("save", 4)]


@pytest.mark.parametrize("when", ["log", "save"])
def test_late_faults_are_raised_before_a_log_or_save(when):
    loop, done, logged = make_loop(steps=3, log_every=3 if when == "log" else 0, every={"save": 3})
    loop.engines.late_faults = {"model": "in its step 1 the loss was not finite"}
    with pytest.raises(TrainingStopped, match=r"Up to step 3 something went wrong. model: in its step 1"):
        loop.run()
    assert (done, logged) == ([], [])


def test_an_interrupted_action_stays_pending_and_runs_after_a_resume():
    loop, done, _ = make_loop(steps=4, every={"eval": 2, "export": 2, "save": 0})

    def cut():
        loop.stop("interrupted")
        raise InterruptedError

    loop.schedule.actions["eval"] = Action(cut, 2)
    assert loop.run() == "interrupted"
    assert done == [("save", 2)]
    state = loop.state_dict()
    assert state == {"step": 2, "skipped": 0, "owed": ["eval", "export"]}
    later, done, _ = make_loop(steps=4, every={"eval": 2, "export": 2, "save": 0})
    later.load_state_dict(state)
    assert later.run() == "finished"
    assert done == [("eval", 2), ("export", 2), ("eval", 4), ("export", 4)]


def test_due_actions_run_before_the_save_in_any_order_of_commands():
    loop, done, _ = make_loop(
        steps=2, every={"eval": 2, "save": 0}, queue=Typed(_1=[("save", None), ("eval", None)], _2=[("save", None)])
    )
    loop.run()
    assert done == [("eval", 1), ("save", 1), ("eval", 2), ("save", 2)]


def test_a_dead_worker_is_reported_unless_the_loop_is_stopping():
    for is_stopping in (False, True):
        loop, done, _ = make_loop(steps=5, every={"save": 0})

        def die(batch, weight, loop=loop, is_stopping=is_stopping):
            if batch == 3:
                if is_stopping:
                    loop.stop("preempted")
                raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

        loop.engines.micro_step = die
        if is_stopping:
            assert loop.run() == "preempted"
        else:
            with pytest.raises(TrainingStopped, match=r"A loader worker died in step 3: .*pid 7"):
                loop.run()
        assert done == [("save", 2)]
        assert loop.batches.num_samples_total == 2


def test_on_step_sees_the_counted_step_before_its_actions_and_may_request_them_or_the_end():
    calls = []

    def on_step():
        calls.append((loop.step, list(done), len(logged)))
        if loop.step == 2:
            loop.request("action", "eval")
        if loop.step == 4:
            loop.request("end", "enough")

    loop, done, logged = make_loop(every={"eval": 5, "export": 0, "save": 3}, log_every=2, on_step=on_step)
    assert loop.run() == "finished"
    assert [step for step, *_ in calls] == [1, 2, 3, 4]
    assert calls[1] == (2, [], 1)
    assert done == [("eval", 2), ("save", 3), ("eval", 4), ("save", 4)]
    assert (loop.step, loop.end_reason) == (4, "enough")


def test_an_action_may_make_its_step_the_last_one_with_the_other_actions_of_a_last_step():
    loop, done, _ = make_loop(every={"eval": 2, "export": 100, "save": 4})
    evaluate = loop.schedule.actions["eval"].do

    def end_at_6():
        evaluate()
        if loop.step == 6:
            loop.end_now("enough", in_action=True)

    loop.schedule.actions["eval"] = Action(end_at_6, 2)
    assert loop.run() == "finished"
    assert done == [("eval", 2), ("eval", 4), ("save", 4), ("eval", 6), ("export", 6), ("save", 6)]


def test_an_error_of_on_step_keeps_the_actions_of_its_step_for_a_resume():
    def on_step():
        if loop.step == 2:
            raise ValueError("its own mistake")

    loop, done, _ = make_loop(every={"eval": 2, "save": 2}, on_step=on_step)
    with pytest.raises(ValueError, match="its own mistake"):
        loop.run()
    assert done == [("save", 2)]
    assert loop.state_dict()["owed"] == ["eval", "save"]


def test_requests_that_were_on_their_way_to_other_ranks_take_effect_after_the_next_step():
    loop, done, _ = make_loop(every={"eval": 0, "save": 100})
    state = {"step": 3, "skipped": 0, "owed": [], "requests": [["action", "eval"], ["end", "enough"]]}
    loop.load_state_dict(state)
    assert loop.run() == "finished"
    assert done == [("eval", 4), ("save", 4)]
    assert "requests" not in loop.state_dict()
