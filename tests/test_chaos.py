"""A run that is killed and resumed equals the uninterrupted run: at random times, and at each file operation."""

import gc
import os
import random
import signal

import pytest
import torch
from chaos import HEAVY, OVERRIDES, Chaos, Zygote, find_difference
from rank_chaos import RankChaos
from zygote import OperationCounter

from runner.checkpoint.checkpoints import Checkpoints, load

SEEDS = 14  # benchmarks/chaos.py runs more


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
@pytest.mark.parametrize(("seed", "method"), [(1, "by_ranks"), (3, "by_launcher")])
def test_a_run_whose_rank_or_launcher_is_killed_is_the_same_run_bit_for_bit(rank_chaos, seed, method):
    getattr(rank_chaos, method)(f"run_{seed}", random.Random(seed))
    assert rank_chaos.troubles == [], rank_chaos.printed[-4000:]
    assert rank_chaos.num_lost == 0
    assert find_difference(rank_chaos.content(f"run_{seed}"), rank_chaos.expected) is None
    assert rank_chaos.num_kills > 0


def make_parts(step):
    return {"model": {"weight": torch.full((1000,), float(step))}, "model.optimizer": {"step": step}}


def save_in_child(folder, steps, crash_at, count_file):
    pid = os.fork()
    if not pid:
        gc.disable()  # threads and other objects of earlier tests must not be freed in a child
        status = 1
        try:
            counter = OperationCounter(crash_at, count_file)
            checkpoints = Checkpoints(folder, keep_last=1)
            for step in steps:
                checkpoints.save(step, make_parts(step), {"step": step})
            counter.write_count()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("steps", [[2, 4], [2, 2]], ids=["next", "again"])
def test_a_crash_at_any_file_operation_of_a_save_loses_nothing(tmp_path, steps):
    count_file = tmp_path / "count"
    assert save_in_child(tmp_path / "whole" / "checkpoints", steps[:1], 0, count_file) != 0  # the run folder is missing
    (tmp_path / "whole").mkdir()
    assert save_in_child(tmp_path / "whole" / "checkpoints", steps, 0, count_file) == 0
    num_operations = int(count_file.read_text())
    (tmp_path / "once").mkdir()
    save_in_child(tmp_path / "once" / "checkpoints", steps[:1], 0, count_file)
    num_first = int(count_file.read_text())
    assert num_operations > num_first + 10
    for crash_at in range(1, num_operations + 1):
        (tmp_path / str(crash_at)).mkdir()
        folder = tmp_path / str(crash_at) / "checkpoints"
        assert save_in_child(folder, steps, crash_at, count_file) == -signal.SIGKILL
        checkpoints = Checkpoints(folder, keep_last=1)
        checkpoints.recover()
        path, faults = checkpoints.newest()
        assert faults == []
        if crash_at > num_first:  # the first save was complete
            assert path is not None
        if path is not None:
            step = load(path)["trainer.json"]["step"]
            assert torch.equal(load(path)["model"]["weight"], torch.full((1000,), float(step)))
        checkpoints.save(6, make_parts(6), {"step": 6})  # leftovers do not prevent a save
        assert [path.name for path in folder.iterdir()] == ["step_00000006"]
