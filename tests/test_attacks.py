"""Hostile run folders, tried with every command that reads one: nothing beside them changes and nothing of them runs.

`attacks/` has the folders; a trial is one of them, whose run it was, and a command.
"""

import pytest
from attacks import checkpoints, links, records, signatures, special, targets, texts
from attacks.plants import trials
from attacks.stage import COMMANDS, Stage
from attacks.plants import Attack

TRIALS = trials()


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    made = Stage(tmp_path_factory.mktemp("stage"))
    yield made
    made.close()


@pytest.mark.parametrize(
    ("attack", "origin", "command"), TRIALS, ids=[f"{attack.name}-{origin}-{command}" for attack, origin, command in TRIALS]
)
def test_a_hostile_folder_changes_no_other_file_and_runs_nothing(stage, attack, origin, command):
    ending, faults = stage.attempt(attack, origin, command)
    assert not faults, ending.printed[-3000:]
