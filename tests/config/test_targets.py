import inspect

import pytest
import torch
from torch.utils.data import Sampler

from runner.config.targets import check_targets, find_sampler_fault, find_wrong_types, locate

SHIPPED = [kind for _, kind in inspect.getmembers(torch.utils.data, inspect.isclass) if issubclass(kind, Sampler)]


@pytest.mark.parametrize("kind", SHIPPED, ids=lambda kind: kind.__name__)
def test_every_sampler_of_torch_is_rejected_with_a_remedy(kind):
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


def test_a_users_sampler_needs_a_state_dict():
    assert "without state_dict(), load_state_dict()" in find_sampler_fault(Bare)
    assert "without state_dict(), load_state_dict()" in find_sampler_fault(Bare())
    assert "without __iter__()" in find_sampler_fault(type("NoIter", (), vars(Whole) | {"__dict__": {}}))
    for usable in (Whole, Whole(), Delegating, Delegating()):
        assert find_sampler_fault(usable) is None


def test_a_distributed_sampler_is_rejected_even_with_a_state_dict():
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
    ("sampler", "message"),
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
def test_a_sampler_that_cannot_resume_is_reported_before_the_first_step(project, sampler, message):
    with (project.folder / "own.py").open("a") as file:
        file.write(SAMPLERS)
    experiment = project.folder / "conf" / "experiment" / "mine.yaml"
    text = experiment.read_text().replace("defaults:\n", "defaults:\n  - override /sampler: null\n")
    experiment.write_text(f"{text}sampler: {sampler}\n")
    printed = project.run("hydra.run.dir=run", status=2)
    assert message in printed
    assert "Traceback" not in printed
    assert not (project.folder / "run").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("raise RuntimeError('broken at import')", ":1: RuntimeError: broken at import"),
        ("import json\njson.loads('x')", ":2: JSONDecodeError: Expecting value"),
        ("from torch import nosuch", ":1: ImportError: cannot import name 'nosuch'"),
        ("import nosuch", ":1: ModuleNotFoundError: No module named 'nosuch'"),
        ("x = 1\ndef f(:\n", ":2: SyntaxError: invalid syntax"),
        ("import sys\nsys.exit(3)", ":2: SystemExit: 3"),
        ("raise BaseException('a\\nb\\x1b[31m')", ":1: BaseException: a\\nb\\x1b[31m"),
        ("def __getattr__(name):\n    raise RuntimeError(name)", ":2: RuntimeError: "),
    ],
)
def test_an_import_error_names_the_last_line_in_the_users_files(tmp_path, monkeypatch, content, expected):
    name = f"fails_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImportError) as caught:
        locate(f"{name}.Model")
    assert f"failed at {name}.py{expected}" in str(caught.value)
    assert str(caught.value).startswith(f"importing {name}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["", ".own.Model", "own..Model", "own.a b", "own.Model\n"])
def test_an_invalid_dotted_path_is_reported(path):
    with pytest.raises(ImportError, match="expected a dotted path such as"):
        locate(path)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"lr": "abc"}, ["optimizer.lr=abc: expected a number, found a text"]),
        ({"lr": "1e-3"}, ["optimizer.lr=1e-3: expected a number, found a text; ${oc.decode:...} makes it a number"]),
        ({"lr": [1]}, ["optimizer.lr=[1]: expected a number, found a list"]),
        ({"lr": {"a": 1}}, ["optimizer.lr={'a': 1}: expected a number, found a mapping"]),
        ({"lr": None}, ["optimizer.lr=null: expected a number"]),
        ({"betas": "abc"}, ["optimizer.betas=abc: expected a list of numbers, found a text"]),
        ({"betas": ["a", 0.9]}, ["optimizer.betas=['a', 0.9]: expected a list of numbers, found a list"]),
        ({"amsgrad": "x"}, ["optimizer.amsgrad=x: expected true or false, found a text"]),
        ({"lr": 1e-3, "betas": [0.9, 0.99], "foreach": None, "capturable": False}, []),
    ],
)
def test_an_argument_annotated_as_a_number_accepts_only_numbers(arguments, expected):
    assert list(find_wrong_types("optimizer", arguments, torch.optim.AdamW)) == expected


def unannotated(width=16, mode="auto", size=3):
    return width + 1


def loosely(size: int = None, path: "Unknown" = 3, either: "int | str" = 3):  # noqa: F821, RUF013
    pass


def test_arguments_without_a_numeric_annotation_are_not_checked():
    assert list(find_wrong_types("model", {"width": "a", "mode": "b", "size": "c"}, unannotated)) == []
    assert list(find_wrong_types("model", {"size": None, "path": "a", "either": "b"}, loosely)) == []


@pytest.mark.parametrize(("role", "has_target"), [("train", False), ("train", True), ("eval", True)])
def test_several_datasets_for_one_key_are_reported_with_a_remedy(role, has_target):
    node = {name: {"_target_": "torch.utils.data.TensorDataset"} for name in ("a", "b")}
    plain = {"engines": {}, "model": None, "sampler": None, "optimizer": None, "scheduler": None, "feeder": None}
    plain |= {"report": None, "distributed": {"strategy": None}}
    plain["data"] = {"train": None, "eval": None, "collate": None}
    plain["data"][role] = node | ({"_target_": "torch.utils.data.ConcatDataset", "datasets": []} if has_target else {})
    with pytest.raises(ValueError, match=rf"^data\.{role}: expected one dataset, found a, b; join them: ") as caught:
        check_targets(plain)
    assert ("or name each" in str(caught.value)) == (role == "eval")
