"""Cut anywhere, the run is the same run: kills at random instants, and at every file operation of a save."""

import gc
import os
import random
import signal

import pytest
import torch
from chaos import HEAVY, OVERRIDES, Chaos, Zygote, find_difference
from rank_chaos import RankChaos
from zygote import Watch

from runner.checkpoint.checkpoints import Checkpoints, load

SEEDS = 20


@pytest.fixture(scope="module")
def zygote():
    started = Zygote()
    yield started
    started.close()


@pytest.fixture(scope="module")
def chaos(zygote, tmp_path_factory):
    from conftest import Project

    project = Project(tmp_path_factory.mktemp("chaos"))
    with open(project.folder / "own.py", "a") as file:
        file.write(HEAVY)
    return Chaos(project.folder, zygote, OVERRIDES)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_run_killed_anywhere_and_resumed_is_the_same_run_bit_for_bit(chaos, seed):
    assert chaos.run_with_kills(f"run_{seed}", random.Random(seed)) > 0
    assert chaos.num_lost == 0
    assert find_difference(chaos.content(f"run_{seed}"), chaos.expected) is None


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def rank_chaos(request, zygote, tmp_path_factory):
    from conftest import Project

    project = Project(tmp_path_factory.mktemp("rank_chaos"))
    with open(project.folder / "own.py", "a") as file:
        file.write(HEAVY)
    return RankChaos(project.folder, zygote, request.param)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "way"), [(1, "by_ranks"), (2, "by_ranks"), (3, "by_launcher")])
def test_a_run_of_which_a_rank_or_the_launcher_is_killed_is_the_same_run_bit_for_bit(rank_chaos, seed, way):
    getattr(rank_chaos, way)(f"run_{seed}", random.Random(seed))
    assert rank_chaos.troubles == [], rank_chaos.printed[-4000:]
    assert rank_chaos.num_lost == 0
    assert find_difference(rank_chaos.content(f"run_{seed}"), rank_chaos.expected) is None
    assert rank_chaos.num_kills > 0


def make_parts(step):
    return {"model": {"weight": torch.full((1000,), float(step))}, "model.optimizer": {"step": step}}


def save_in_child(folder, steps, crash_at, counted):
    pid = os.fork()
    if not pid:
        gc.disable()  # what other tests have left, such as threads, may not be taken apart in a child
        status = 1
        try:
            watch = Watch(crash_at, counted)
            checkpoints = Checkpoints(folder, keep_last=1)
            for step in steps:
                checkpoints.save(step, make_parts(step), {"step": step})
            watch.tell()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("steps", [[2, 4], [2, 2]], ids=["next", "again"])
def test_a_crash_at_any_file_operation_of_a_save_loses_nothing(tmp_path, steps):
    counted = tmp_path / "count"
    assert save_in_child(tmp_path / "whole" / "checkpoints", steps[:1], 0, counted) != 0  # its folder is not there
    (tmp_path / "whole").mkdir()
    assert save_in_child(tmp_path / "whole" / "checkpoints", steps, 0, counted) == 0
    total = int(counted.read_text())
    (tmp_path / "once").mkdir()
    save_in_child(tmp_path / "once" / "checkpoints", steps[:1], 0, counted)
    first = int(counted.read_text())
    assert total > first + 10
    for crash_at in range(1, total + 1):
        (tmp_path / str(crash_at)).mkdir()
        folder = tmp_path / str(crash_at) / "checkpoints"
        assert save_in_child(folder, steps, crash_at, counted) == -signal.SIGKILL
        checkpoints = Checkpoints(folder, keep_last=1)
        checkpoints.recover()
        path, faults = checkpoints.newest()
        assert faults == []
        if crash_at > first:  # the first save was done
            assert path is not None
        if path is not None:
            step = load(path)["trainer.json"]["step"]
            assert torch.equal(load(path)["model"]["weight"], torch.full((1000,), float(step)))
        checkpoints.save(6, make_parts(6), {"step": 6})  # what is left over is in nobody's way
        assert [each.name for each in folder.iterdir()] == ["step_00000006"]
