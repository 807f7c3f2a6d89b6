"""`runner.tracking.null`: each stand-in has the public methods and attributes of the class it replaces."""

import inspect

import pytest

from runner.checkpoint.saver import Saver
from runner.tracking.null import NullRunRecord, NullSaver, NullTracker
from runner.tracking.run_record import RunRecord
from runner.tracking.tracker import TrackerThread

PAIRS = [(NullTracker, TrackerThread), (NullRunRecord, RunRecord), (NullSaver, Saver)]


def public_methods(cls):
    return {name: method for name, method in vars(cls).items() if inspect.isfunction(method) and name[0] != "_"}


def parameters_of(method):
    """Returns the names, kinds and defaults of a method's parameters."""
    return [(each.name, each.kind, each.default) for each in inspect.signature(method).parameters.values()]


@pytest.mark.parametrize(("null", "original"), PAIRS)
def test_a_null_object_has_the_public_methods_of_its_class_with_their_parameters(null, original):
    methods, originals = public_methods(null), public_methods(original)
    assert methods.keys() == originals.keys()
    for name, method in methods.items():
        assert parameters_of(method) == parameters_of(originals[name]), name


@pytest.mark.parametrize(("null", "original"), PAIRS)
def test_a_null_object_has_the_public_attributes_of_its_class(null, original, tmp_path):
    arguments = {
        TrackerThread: {"folder": tmp_path},
        RunRecord: {"folder": tmp_path, "may_read_git": bool},
        Saver: {"checkpoints": None, "before_commit": bool, "saved": bool, "failed": bool},
    }
    made = original(**arguments[original])
    assert {name for name in vars(made) if name[0] != "_"} == {
        name for name in vars(null) if name[0] != "_" and name not in public_methods(null)
    }
    made.close() if original is TrackerThread else None


@pytest.mark.parametrize("null", [null for null, _ in PAIRS])
def test_a_misspelt_call_of_a_null_object_fails(null):
    with pytest.raises(AttributeError):
        null().lgo(1, {})


def test_calls_of_a_null_object_do_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker, record, saver = NullTracker(), NullRunRecord(), NullSaver()
    tracker.log(1, {"train/loss": 1.0})
    record.start_session(name="run")
    saver.save(1, {}, {})
    assert (tracker.counts(), record.read(), record.crashed, [*record.faults]) == ({}, {}, None, [])
    assert [*tmp_path.iterdir()] == []
