"""Hostile run folders, tried with the commands that read one: nothing beside them changes and nothing of them runs.

`attacks/` has some 500 folders; a trial is one of them, whose run it was, and a command. ATTACKS=all tries each folder
with each of its commands; by default some folders of each class are tried with one, which takes a quarter of the time.
"""

import os
from collections import Counter

import pytest
import torch
from attacks import checkpoints, links, records, signatures, special, targets, texts
from attacks.plants import OWN, UNTRUSTED, Attack, newest, seal, trials
from attacks.stage import Stage

from runner.utils import io

CLASSES = (links, special, targets, texts, checkpoints, records, signatures)
TRIALS = trials(os.environ.get("ATTACKS") == "all")


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    made = Stage(tmp_path_factory.mktemp("stage"))
    yield made
    made.close()


@pytest.mark.parametrize(
    ("attack", "origin", "command"),
    TRIALS,
    ids=[f"{attack.name}-{origin}-{command}" for attack, origin, command in TRIALS],
)
def test_a_hostile_folder_changes_no_other_file_and_runs_nothing(stage, attack, origin, command):
    ending, faults = stage.attempt(attack, origin, command)
    assert not faults, ending.printed[-3000:]


def test_there_are_hundreds_of_hostile_folders_of_each_class_many():
    numbers = Counter(attack.plant.__module__ for attack, _, _ in TRIALS)
    assert min(numbers[module.__name__] for module in CLASSES) >= 30, numbers
    assert {command for _, _, command in TRIALS} >= {"resume", "evaluate", "export", "sweep", "requeue", "restart"}


def untouched(run, decoy):
    """Leaves the run as it was."""


def sealed(run, decoy):
    """Writes the manifest anew, as attacks do."""
    seal(newest(run))


def pickled(run, decoy):
    """Puts the same weights in a .pt file, as attacks do with others."""
    path = newest(run) / "model.safetensors"
    torch.save(io.load(path), path.with_suffix(".pt"))
    path.unlink()
    seal(newest(run))


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (OWN, "resume"),
        (OWN, "evaluate"),
        (OWN, "export"),
        (OWN, "requeue"),
        (OWN, "restart"),
        (OWN, "sweep"),
        (UNTRUSTED, "resume"),
        (UNTRUSTED, "resume_checkpoint"),
        (UNTRUSTED, "evaluate"),
        (UNTRUSTED, "evaluate_checkpoint"),
        (UNTRUSTED, "evaluate_export"),
        (UNTRUSTED, "export"),
    ],
)
def test_a_harmless_folder_passes(stage, origin, command):
    ending, faults = stage.attempt(Attack("none", untouched, (), ()), origin, command)
    assert not faults, ending.printed
    assert ending.status == 0, ending.printed


@pytest.mark.parametrize("plant", [sealed, pickled])
def test_a_checkpoint_is_read_if_its_sums_are_right(stage, plant):
    ending, faults = stage.attempt(Attack("none", plant, (), ()), UNTRUSTED, "evaluate")
    assert not faults, ending.printed
    assert ending.status == 0, ending.printed
    assert "Passed over" not in ending.printed


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        ("change_a_file", "it changed decoy/diary.txt"),
        ("make_a_file", "it changed home, home/.cache"),
        ("change_a_mode", "it changed decoy/tool"),
        ("touch_a_folder", "it changed decoy/notes"),
        ("leave_the_canary", "the canary ran"),
        ("print_escapes", "it printed the control character '\\x1b'"),
        ("print_a_forged_line", "it printed a forged line"),
        ("print_the_secret", "it printed the secret of the environment"),
        ("keep_the_secret", "log.txt holds the secret"),
        ("log_escapes", "log.txt has a forged line"),
        ("print_much", "it printed 1000001 bytes"),
        ("raise", "it printed a traceback"),
        ("hang", "it did not end in time"),
        ("open_a_pipe", "it did not end in time"),
        ("grow", "it printed a traceback"),
        ("start_processes", "it started "),
        ("end_by_a_signal", "it ended with status -11"),
        ("end_with_a_status", "it ended with status 139"),
    ],
)
def test_the_stage_notices_harm(stage, harm, fault, monkeypatch):
    if fault == "it did not end in time":
        monkeypatch.setattr(stage, "limit_s", 1.0)
    _, faults = stage.attempt(Attack("none", untouched, (), (), (harm,)), OWN, "harmful")
    assert [each for each in faults if each.startswith(fault)], faults
