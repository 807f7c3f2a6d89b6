from types import SimpleNamespace

import pytest
import torch

from runner.utils.agenda import Action
from runner.utils.train import Loop, Stop


class Counting:
    """Stands where engines do: it notes what the loop does and draws one random number a micro-step."""

    device = torch.device("cpu")
    tokens = 0
    is_updating = False

    def __init__(self):
        self.batches, self.drawn = [], []
        self.num_steps = self.num_discarded = 0
        self.faults, self.late_faults, self.stops = {}, {}, False

    def micro_step(self, batch):
        self.batches.append(batch)
        self.drawn.append(torch.rand(()).item())

    def step(self):
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
    def __init__(self, start=0):
        self.num_samples_total = start

    def __next__(self):
        self.num_samples_total += 1
        return self.num_samples_total

    def mark(self):
        return self.num_samples_total

    def rewind(self, mark):
        self.num_samples_total = mark


class Typed:
    """An inbox with commands by the step at which they are due."""

    def __init__(self, **by_step):
        self.by_step = {int(key[1:]): value for key, value in by_step.items()}

    def due(self, step):
        return [SimpleNamespace(name=n, argument=a) for n, a in self.by_step.pop(step, [])]


def make_loop(steps=10, **settings):
    done, logged = [], []
    every = settings.pop("every", {})
    loop = Loop(
        Counting(),
        Numbers(),
        steps=steps,
        log=lambda step, values: logged.append((step, values)),
        actions={name: Action(lambda n=name: done.append((n, loop.step)), number) for name, number in every.items()},
        **settings,
    )
    return loop, done, logged


def test_each_step_takes_its_micro_steps():
    loop, _, _ = make_loop(steps=3, accumulate=4)
    assert loop.run() == "finished"
    assert loop.engines.batches == list(range(1, 13))


def test_actions_are_done_every_so_many_steps_and_at_the_end_in_order():
    loop, done, _ = make_loop(steps=7, every={"eval": 3, "save": 2, "export": 0})
    loop.run()
    assert done == [("save", 2), ("eval", 3), ("save", 4), ("eval", 6), ("save", 6), ("eval", 7), ("save", 7)]


def test_the_last_boundary_does_an_action_once():
    loop, done, _ = make_loop(steps=4, every={"save": 2})
    loop.run()
    assert done == [("save", 2), ("save", 4)]


def test_metrics_are_logged_every_so_many_steps_and_at_the_end():
    loop, _, logged = make_loop(steps=7, log_every=3)
    loop.run()
    assert [step for step, _ in logged] == [3, 6, 7]
    assert logged[0][1]["train/loss"] == 3.0
    assert {"train/step_time_s", "train/samples_per_s", "train/memory_gb"} <= logged[0][1].keys()


def test_log_every_zero_logs_nothing():
    loop, _, logged = make_loop(steps=3, log_every=0)
    loop.run()
    assert logged == []


def test_what_is_drawn_is_a_function_of_seed_step_micro_step_and_rank():
    def drawn(**settings):
        loop, _, _ = make_loop(**({"steps": 4, "accumulate": 2} | settings))
        loop.run()
        return loop.engines.drawn

    first = drawn(seed=1)
    assert len(set(first)) == 8
    torch.rand(17)  # what others have drawn does not matter
    assert drawn(seed=1) == first
    assert not set(drawn(seed=2)) & set(first)
    assert not set(drawn(seed=1, rank=1)) & set(first)


def test_a_step_can_be_replayed_alone():
    loop, _, _ = make_loop(steps=6)
    loop.run()
    later, _, _ = make_loop(steps=6)
    later.load_state_dict({"step": 4, "skipped": 0, "owed": []})
    later.run()
    assert later.engines.drawn == loop.engines.drawn[4:]


def test_actions_between_steps_do_not_change_what_steps_draw():
    plain, _, _ = make_loop(steps=5)
    plain.run()
    busy, _, _ = make_loop(steps=5)
    busy.agenda.actions["eval"] = Action(lambda: torch.rand(100), 1)
    busy.run()
    assert busy.engines.drawn == plain.engines.drawn


def test_commands_are_executed_at_their_boundary_and_unknown_to_actions_go_to_commands():
    told = []
    inbox = Typed(_2=[("save", None), ("lr", 0.5)])
    loop, done, _ = make_loop(
        steps=3, every={"save": 0}, inbox=inbox, commands={"lr": lambda lr: told.append((loop.step, lr))}
    )
    loop.run()
    assert done == [("save", 2)]
    assert told == [(2, 0.5)]


def test_a_typed_action_is_not_repeated_at_the_same_boundary():
    loop, done, _ = make_loop(steps=4, every={"save": 2}, inbox=Typed(_2=[("save", None)]))
    loop.run()
    assert done == [("save", 2), ("save", 4)]


def test_stop_saves_once_and_returns_its_reason():
    def end(_):
        raise Stop("quit")

    loop, done, _ = make_loop(
        steps=9, every={"eval": 2, "save": 5}, inbox=Typed(_4=[("quit", None)]), commands={"quit": end}
    )
    assert loop.run() == "quit"
    assert (loop.step, done) == (4, [("eval", 2), ("save", 4)])


def test_a_stop_asked_for_from_outside_ends_at_the_next_boundary():
    loop, done, _ = make_loop(steps=9, every={"save": 0})
    loop.engines.micro_step = lambda batch: loop.stop("interrupted") if batch == 3 else None
    assert loop.run() == "interrupted"
    assert done == [("save", 3)]


def test_a_finished_loop_that_is_resumed_does_nothing():
    loop, done, _ = make_loop(steps=5, every={"save": 1})
    loop.load_state_dict({"step": 5, "skipped": 0, "owed": []})
    assert loop.run() == "finished"
    assert (done, loop.engines.batches) == ([], [])


def test_the_time_of_actions_does_not_count_as_training(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("runner.utils.train.time.perf_counter", lambda: now[0])
    loop, _, logged = make_loop(steps=4, log_every=2)

    def pass_time(seconds):
        now[0] += seconds

    loop.agenda.actions["eval"] = Action(lambda: pass_time(100.0), 1)
    loop.engines.micro_step = lambda batch: pass_time(1.0)
    loop.run()
    assert [values["train/step_time_s"] for _, values in logged] == pytest.approx([1.0, 1.0])
