import inspect

import pytest
import torch
from torch.utils.data import Sampler

from runner.targets import find_sampler_fault

SHIPPED = [kind for _, kind in inspect.getmembers(torch.utils.data, inspect.isclass) if issubclass(kind, Sampler)]


@pytest.mark.parametrize("kind", SHIPPED, ids=lambda kind: kind.__name__)
def test_every_sampler_of_torch_is_refused_with_a_remedy(kind):
    fault = find_sampler_fault(kind)
    assert fault is not None
    remedy = fault.rpartition("; ")[2]
    assert "sampler" in remedy
    if kind not in (Sampler, torch.utils.data.WeightedRandomSampler):
        assert "choose sampler=" in remedy
        assert "runner.utils.sampler." in remedy


class Bare:
    def __iter__(self):
        return iter([0])


class Whole(Bare):
    def state_dict(self):
        return {"position": 0}

    def load_state_dict(self, state):
        pass


class Delegating:
    def __init__(self):
        self.inner = Whole()

    def __iter__(self):
        return iter(self.inner)

    def __getattr__(self, name):
        return getattr(self.inner, name)


class Sharing(torch.utils.data.DistributedSampler, Whole):
    pass


def test_a_sampler_of_ones_own_needs_a_state():
    assert "without state_dict(), load_state_dict()" in find_sampler_fault(Bare)
    assert "without state_dict(), load_state_dict()" in find_sampler_fault(Bare())
    assert "without __iter__()" in find_sampler_fault(type("NoIter", (), vars(Whole) | {"__dict__": {}}))
    for usable in (Whole, Whole(), Delegating, Delegating()):
        assert find_sampler_fault(usable) is None


def test_a_sampler_that_takes_a_ranks_share_is_refused_although_it_has_a_state():
    assert "choose sampler=random" in find_sampler_fault(Sharing)


SAMPLERS = """

class Counting:
    def __init__(self, length):
        self.length = length

    def __iter__(self):
        return iter(range(self.length))

    def state_dict(self):
        return {"position": 3}

    def load_state_dict(self, state):
        if state["position"]:
            raise ValueError(f"no position: {state['position']}")


class Number(Counting):
    def state_dict(self):
        return 3


def make_torchs(length):
    return torch.utils.data.SequentialSampler(range(length))
"""


@pytest.mark.parametrize(
    ("sampler", "told"),
    [
        (
            "{_target_: torch.utils.data.WeightedRandomSampler, weights: [1.0, 2.0], num_samples: 2}",
            "sampler._target_=torch.utils.data.WeightedRandomSampler: expected a sampler that resumes",
        ),
        (
            "{_target_: torch.utils.data.BatchSampler, sampler: {_target_: runner.utils.sampler.OrderedSampler, "
            "length: 9}, batch_size: 3, drop_last: false}",
            "sampler._target_=torch.utils.data.BatchSampler: expected a sampler that resumes",
        ),
        ("{_target_: own.make_torchs}", "sampler: SequentialSampler: expected a sampler that resumes"),
        ("{_target_: own.Counting}", "sampler: no position: 3"),
        ("{_target_: own.Number}", "sampler: Number.state_dict: expected a mapping, found 3"),
    ],
)
def test_a_sampler_that_can_not_resume_ends_in_one_message_before_the_first_step(project, sampler, told):
    with (project.folder / "own.py").open("a") as file:
        file.write(SAMPLERS)
    experiment = project.folder / "conf" / "experiment" / "mine.yaml"
    text = experiment.read_text().replace("defaults:\n", "defaults:\n  - override /sampler: null\n")
    experiment.write_text(f"{text}sampler: {sampler}\n")
    printed = project.run("hydra.run.dir=run", status=2)
    assert told in printed
    assert "Traceback" not in printed
    assert not (project.folder / "run").exists()
