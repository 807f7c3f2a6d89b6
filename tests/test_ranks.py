"""Runs on 2 and 4 ranks equal the run of one process, and end together."""

import json
import os
import pickle
import re
import resource
import signal
import time

import pytest
import torch
import torch.distributed as dist
from chaos import find_difference
from conftest import WORKER_MODULES, read_metrics, shared_zygote
from ranks import Ranks
from waiting import wait_for_content

from runner.checkpoint import checkpoints
from runner.utils import io

STEPS = 100
BASE = ["--config-dir", "conf", "experiment=mine", "+model.dropout=0", "trainer.eval_every=0", "trainer.save_every=0"]
BASE += ["distributed.timeout_s=60"]  # a rank can wait this long where gloo misses that another has ended
DDP, FSDP = "distributed=ddp", "distributed=fsdp"


@pytest.fixture
def zygote():
    return shared_zygote(*WORKER_MODULES)


@pytest.fixture
def ranks(zygote):
    return Ranks(zygote)


def run_alone(ranks, project, *argv, status=0):
    pid = ranks.zygote.start(project.folder, [*BASE, *argv])
    assert ranks.zygote.wait(pid) == status, (project.folder / "printed.txt").read_text()[-3000:]


def losses(folder, names=("train/loss", "train/grad_norm")):
    return torch.tensor([[line[name] for name in names] for line in read_metrics(folder) if names[0] in line])


def state_of(run, step):
    return checkpoints.load(run / "checkpoints" / f"step_{step:08d}")


@pytest.mark.parametrize("sampler", ["pool", "batched_ordered"])
def test_losses_norms_and_weights_equal_those_of_one_process(ranks, project, sampler):
    limit = ["sampler.max_cost=31", "sampler.max_size=null"] if sampler == "batched_ordered" else []
    argv = [f"sampler={sampler}", *limit, f"trainer.steps={STEPS}", "trainer.save_every=100", "trainer.eval_every=50"]
    run_alone(ranks, project, *argv, "hydra.run.dir=one")
    one = state_of(project.folder / "one", STEPS)
    layouts = ((2, DDP), (4, DDP), (2, FSDP), (4, FSDP))
    for count, how in layouts if sampler == "pool" else layouts[1:3]:
        name = f"{how[12:]}_{count}"
        ranks.run(project.folder, count, *BASE, *argv, how, f"hydra.run.dir={name}")
        run = project.folder / name
        torch.testing.assert_close(losses(run), losses(project.folder / "one"), rtol=0, atol=1e-5)
        expected = losses(project.folder / "one", ["eval/loss"])
        torch.testing.assert_close(losses(run, ["eval/loss"]), expected, rtol=0, atol=1e-5)
        state = state_of(run, STEPS)
        assert state["trainer.json"]["batches"] == one["trainer.json"]["batches"]
        for key, value in one["model"].items():
            torch.testing.assert_close(state["model"][key], value, rtol=0, atol=1e-5)
        assert len(read_metrics(run)) == len(read_metrics(project.folder / "one"))
        assert json.loads((run / "run.json").read_text())["ranks"] == count


@pytest.mark.parametrize("how", [DDP, FSDP])
def test_a_checkpoint_of_two_ranks_resumes_on_any_number(ranks, project, how):
    run_alone(ranks, project, "hydra.run.dir=one")
    count = "distributed.nproc_per_node=2"  # overridden by torchrun's number
    ranks.run(project.folder, 2, *BASE, how, count, "hydra.run.dir=two", typed="quit@8\n")
    expected = losses(project.folder / "one")
    for count, other in ((1, "distributed=single"), (4, DDP), (4, FSDP), (2, how)):
        project.copy("two", "again")
        argv = ["resume=again", other]
        if count == 1:
            run_alone(ranks, project, *argv)
        else:
            ranks.run(project.folder, count, *BASE, *argv)
        torch.testing.assert_close(losses(project.folder / "again"), expected, rtol=0, atol=1e-5)
        assert state_of(project.folder / "again", 8)["trainer.json"]["batches"]["ordinal"] == 64


@pytest.mark.parametrize("how", [DDP, FSDP])
def test_exports_equal_those_of_one_process(ranks, project, how):
    argv = ["trainer.steps=8", "trainer.export_every=8"]
    run_alone(ranks, project, *argv, "hydra.run.dir=one")
    ranks.run(project.folder, 2, *BASE, *argv, how, "hydra.run.dir=two")
    one, two = (io.load(project.folder / name / "exports" / "model.safetensors") for name in ("one", "two"))
    assert list(one) == list(two)
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-6)


def test_a_run_on_two_ranks_is_reproducible_and_resumes_bit_for_bit(ranks, project):
    argv = ["trainer.steps=12", "trainer.accumulate=2", "sampler=pool", "model.dropout=0.3", DDP]
    base = [override for override in BASE if "dropout" not in override]
    whole = [*base, *[override for override in argv if "dropout" not in override], "trainer.save_every=4"]
    ranks.run(project.folder, 2, *whole, "hydra.run.dir=whole")
    ranks.run(project.folder, 2, *whole, "hydra.run.dir=cut", typed="quit@6\n")
    ranks.run(project.folder, 2, *whole, "resume=cut")
    one, two = state_of(project.folder / "whole", 12), state_of(project.folder / "cut", 12)
    assert find_difference(one, two) is None
    assert torch.equal(losses(project.folder / "whole"), losses(project.folder / "cut"))


FAILS_AT_CALL = ("feeder={_target_: own.fail_at_call}", "trainer.accumulate=2", DDP)


def run_with_failure(ranks, project, failure, *argv, rank=1, status):
    """Runs with a failure on one rank only."""
    return ranks.run(project.folder, 2, *BASE, *argv, status=status, by_rank={rank: {"OWN_FAILURE": failure}})


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("nan@7", r"Step 4 .* on rank {rank} its loss of micro-step 1 is nan.* The step was discarded"),
        ("nan@8", r"Step 4 .* on rank {rank} its loss of micro-step 2 is nan.* The step was discarded"),
        ("oom@7", r"rank {rank}: Out of memory in step 4: this process had"),
        ("oom@8", r"rank {rank}: Out of memory in step 4: this process had"),
    ],
)
def test_a_failure_on_one_rank_ends_all_ranks_and_the_run_can_be_resumed(ranks, project, failure, message, rank):
    printed = run_with_failure(ranks, project, failure, *FAILS_AT_CALL, "hydra.run.dir=cut", rank=rank, status=1)
    assert re.search(message.format(rank=rank), printed), printed
    assert [path.name for path in (project.folder / "cut" / "checkpoints").glob("step_*")] == ["step_00000003"]
    record = json.loads((project.folder / "cut" / "run.json").read_text())
    assert (record["status"], record["last_step"]) == ("failed", 3)
    if rank == 1 and failure != "nan@8":
        ranks.run(project.folder, 2, *BASE, *FAILS_AT_CALL, "hydra.run.dir=whole", "trainer.save_every=12")
        ranks.run(project.folder, 2, *BASE, *FAILS_AT_CALL, "resume=cut", "trainer.save_every=12")
        one, two = state_of(project.folder / "whole", 12), state_of(project.folder / "cut", 12)
        assert find_difference(one["model"], two["model"]) is None
        assert torch.equal(losses(project.folder / "whole"), losses(project.folder / "cut"))


@pytest.mark.parametrize("failure", ["nan@7", "oom@8"])
def test_a_step_that_fails_on_one_rank_is_skipped_by_all(ranks, project, failure):
    skip = ("trainer.on_nonfinite=skip", "trainer.on_oom=skip", "trainer.save_every=12", *FAILS_AT_CALL)
    printed = run_with_failure(ranks, project, failure, *skip, "hydra.run.dir=one", rank=1, status=0)
    assert "It is left out, as number 1 of at most 100" in printed
    run_with_failure(ranks, project, failure, *skip, "hydra.run.dir=other", rank=0, status=0)
    one, other = state_of(project.folder / "one", 12), state_of(project.folder / "other", 12)
    assert find_difference(one["model"], other["model"]) is None
    assert one["model.optimizer"]["counters"]["steps"] == 11


RAISES_AT = """

def err(place, count):
    # OWN_ERROR is the place and count at which an error is raised, such as forward@5
    kind, _, at = os.environ.get("OWN_ERROR", "").partition("@")
    if kind == place and int(at) == count:
        {}["its own mistake"]
    if kind == f"{place}_memory" and int(at) == count:
        raise torch.OutOfMemoryError("of its own")


class Mistaken(Model):
    count = 0

    def forward(self, x, y):
        found = super().forward(x, y)
        if self.training:
            self.count += 1
            err("forward", self.count)
            found["loss"].register_hook(lambda grad: err("backward", self.count))
        return found


class Files(Data):
    def __getitem__(self, index):
        err("data", index)
        return super().__getitem__(index)


def reported(module, dataset):
    err("report", module.count)
    return {}
"""


@pytest.mark.parametrize(
    ("how", "mistake", "ranks_of", "step"),
    [
        (DDP, "forward@7", [1], 3),
        (DDP, "forward@8", [0], 3),
        (DDP, "forward@7", [0, 1], 3),
        (DDP, "data@44", [1], 2),
        (DDP, "report@8", [1], 4),
        (DDP, "backward@8", [0], 3),  # during an all-reduce: rank zero saves alone
        (DDP, "backward@8", [1], 3),
        (DDP, "backward@8", [0, 1], 3),
        (FSDP, "forward@8", [0, 1], 3),  # no rank waits for another
        (FSDP, "backward@7", [0, 1], 3),
        (FSDP, "report@8", [0, 1], 4),
    ],
)
def test_an_error_on_some_ranks_ends_all_with_a_checkpoint_and_one_traceback(
    ranks, project, how, mistake, ranks_of, step
):
    with open(project.folder / "own.py", "a") as file:
        file.write(RAISES_AT)
    argv = [how, "model._target_=own.Mistaken", "data.train._target_=own.Files", "report._target_=own.reported"]
    argv += ["trainer.accumulate=2", "trainer.eval_every=4", "hydra.run.dir=cut"]
    by_rank = {rank: {"OWN_ERROR": mistake} for rank in ranks_of}
    printed = ranks.run(project.folder, 2, *BASE, *argv, status=1, by_rank=by_rank)
    assert printed.count("Traceback (most recent call last)") == 1
    assert "KeyError: 'its own mistake'" in printed
    log = (project.folder / "cut" / "log.txt").read_text()
    assert '{}["its own mistake"]' in log  # the traceback of where it happened
    assert ("at index 44 of the dataset Files" in log) == (mistake == "data@44")
    record = json.loads((project.folder / "cut" / "run.json").read_text())
    assert (record["status"], record["last_step"]) == ("failed", step)
    assert record["reason"].startswith("KeyError" if 0 in ranks_of else "rank 1: KeyError")
    assert [path.name for path in (project.folder / "cut" / "checkpoints").glob("step_*")] == [f"step_{step:08d}"]
    if mistake == "data@44" or (how, mistake, ranks_of) in [(DDP, "backward@8", [1]), (FSDP, "forward@8", [0, 1])]:
        ranks.run(project.folder, 2, *BASE, *argv, "hydra.run.dir=whole", "trainer.save_every=12")
        ranks.run(project.folder, 2, *BASE, *argv[:-1], "resume=cut", "trainer.save_every=12")
        assert find_difference(state_of(project.folder / "whole", 12), state_of(project.folder / "cut", 12)) is None
        assert torch.equal(losses(project.folder / "whole"), losses(project.folder / "cut"))


def test_out_of_memory_during_an_all_reduce_is_one_message_and_rank_zero_saves_alone(ranks, project):
    with open(project.folder / "own.py", "a") as file:
        file.write(RAISES_AT)
    argv = [DDP, "model._target_=own.Mistaken", "hydra.run.dir=cut"]
    printed = ranks.run(project.folder, 2, *BASE, *argv, status=1, by_rank={1: {"OWN_ERROR": "backward_memory@4"}})
    assert "Traceback" not in printed
    assert "rank 1: Out of memory in step 4: " in printed
    assert [path.name for path in (project.folder / "cut" / "checkpoints").glob("step_*")] == ["step_00000003"]


def test_commands_typed_at_rank_zero_act_on_all_ranks(ranks, project):
    typed = "lr 1e-3@4\nsave@5\nnonsense\neval@6\nquit@7\n"
    printed = ranks.run(project.folder, 2, *BASE, DDP, "hydra.run.dir=run", typed=typed)
    assert "'nonsense' is no command" in printed
    lines = read_metrics(project.folder / "run")
    rates = [line["train/lr"] for line in lines if "train/lr" in line]
    assert rates[4] < 0.11 * rates[3]
    assert [line["step"] for line in lines if "eval/loss" in line] == [6]
    assert [path.name for path in sorted((project.folder / "run" / "checkpoints").glob("step_*"))] == [
        "step_00000005",
        "step_00000007",
    ]


@pytest.mark.parametrize("how", [DDP, FSDP])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_saves_and_ends_all_ranks(ranks, project, how, rank):
    argv = [how, "hydra.run.dir=run", "trainer.steps=100000", "trainer.log_every=100"]
    pids = ranks.start(project.folder, 2, *BASE, *argv)
    wait_for_content(project.folder / "run" / "metrics.jsonl", b'"step": 100,')
    os.kill(pids[rank], signal.SIGTERM)
    assert ranks.wait(pids) == [75, 75]
    (found,) = (project.folder / "run" / "checkpoints").glob("step_*")
    assert json.loads((project.folder / "run" / "run.json").read_text())["last_step"] == int(found.name[5:])


def test_a_killed_rank_ends_the_others_at_once_or_within_the_timeout(ranks, project):
    """Rarely, gloo waits in `waitSend` although the connection is closed; then only the timeout ends it."""
    argv = [DDP, "hydra.run.dir=run", "trainer.steps=100000", "trainer.log_every=100", "distributed.timeout_s=15"]
    pids = ranks.start(project.folder, 2, *BASE, *argv)
    wait_for_content(project.folder / "run" / "metrics.jsonl", b'"step": 100,')
    os.kill(pids[1], signal.SIGKILL)
    began = time.monotonic()
    assert ranks.wait(pids) == [1, -signal.SIGKILL]
    took_s = time.monotonic() - began
    if "another rank is gone" not in (project.folder / "printed.txt").read_text():
        assert took_s > 15
        assert "rank 0 made no step" in (project.folder / "run" / "log.txt").read_text()
    assert took_s < 40


@pytest.mark.parametrize("when", ["train", "eval"])
def test_a_rank_that_hangs_is_ended_within_the_timeout_with_its_stack_in_the_log(ranks, project, when):
    hang = f"""

class Hangs(Model):
    def forward(self, x, y):
        if os.environ.get("OWN_HANG") and self.training == {when == "train"}:
            time.sleep(1000)
        return super().forward(x, y)
"""
    with open(project.folder / "own.py", "a") as file:
        file.write(hang)
    argv = [DDP, "model._target_=own.Hangs", "hydra.run.dir=run", "distributed.timeout_s=6", "trainer.eval_every=2"]
    # The timeout includes the time that rank 1 waits for rank 0, which takes seconds on a busy machine.
    statuses = ranks.wait(ranks.start(project.folder, 2, *BASE, *argv, by_rank={1: {"OWN_HANG": "1"}}))
    assert statuses[1] == 1
    assert statuses[0] != 0
    log = (project.folder / "run" / "log.txt").read_text()
    assert re.search(r"rank 1 made no step for \d+ s and is ended; its stacks:", log)
    assert "in forward" in log.partition("rank 1 made no step")[2]


def test_a_write_error_of_rank_zero_ends_all_ranks_with_its_message(ranks, project, tmp_path):
    argv = [DDP, "trainer.log_every=1", "hydra.run.dir=run", "trainer.steps=100000"]
    pids = ranks.start(project.folder, 2, *BASE, *argv, environment={"OWN_LIMIT": "1"})
    wait_for_content(project.folder / "run" / "metrics.jsonl", b'"step": 20,')
    for name in ("metrics.jsonl",):
        resource.prlimit(pids[0], resource.RLIMIT_FSIZE, (4096, 4096))
        assert (project.folder / "run" / name).exists()
    assert ranks.wait(pids) == [1, 1]
    printed = (project.folder / "printed.txt").read_text()
    assert "the run's numbers can't be written" in printed


def test_a_mistake_is_reported_once_with_status_2(ranks, project):
    for argv, message in (
        (["trainer.stps=3"], "trainer.stps: no such key"),
        (["distributed=single"], "it trains on one process, and 2 were started"),
        ([DDP, "data.batch_size=1"], "2 ranks share 1"),
        ([DDP, "data.train.length=0"], "data.train: the dataset is empty"),
    ):
        printed = ranks.run(project.folder, 2, *BASE, "hydra.run.dir=run", *argv, status=2)
        assert printed.count(message) == 1, printed
        assert not (project.folder / "run").exists()


def test_a_sweep_of_several_processes_has_one_folder_per_job(ranks, project):
    ranks.run(project.folder, 2, *BASE, DDP, "-m", "seed=1,2", "trainer.save_every=12", "hydra.sweep.dir=sweep")
    for job in (project.folder / "sweep").glob("*-*"):
        assert {path.name for path in job.iterdir()} >= {
            ".hydra",
            "run.json",
            "metrics.jsonl",
            "log.txt",
            "checkpoints",
        }
    assert len(list((project.folder / "sweep").glob("*-*"))) == 2


def test_cfg_job_prints_once_and_ends_all_ranks(ranks, project):
    printed = ranks.run(project.folder, 2, *BASE, DDP, "--cfg", "job")
    assert printed.count("batch_size: 8") == 1


FAILING = """

class Fails(Normed):
    # OWN_FAILS is the kind of error and the mode, such as raise@eval
    count = 0

    def forward(self, x, y):
        kind, _, when = os.environ.get("OWN_FAILS", "").partition("@")
        found = super().forward(x, y)
        self.count += self.training == (when != "eval")
        if kind and self.count == 5 and self.training == (when != "eval"):
            if kind == "raise":
                raise RuntimeError("the model's own mistake")
            found["loss"].register_hook(lambda grad: 1 / 0)
        return found
"""


@pytest.mark.parametrize(
    ("how", "fails", "message"),
    [
        (FSDP, "raise@train", "rank 1: RuntimeError: the model's own mistake"),
        (FSDP, "raise@eval", "rank 1: RuntimeError: the model's own mistake"),
        (FSDP, "hook@train", "rank 1: ZeroDivisionError: division by zero"),
        (DDP, "hook@train", "rank 1: ZeroDivisionError: division by zero"),
        (DDP, "raise@eval", "rank 1: RuntimeError: the model's own mistake"),
    ],
)
def test_an_error_during_a_collective_ends_all_ranks_at_once_with_its_message(ranks, project, how, fails, message):
    with open(project.folder / "own.py", "a") as file:
        file.write(FAILING)
    argv = [how, "model._target_=own.Fails", "hydra.run.dir=run", "trainer.eval_every=2", "data.eval.length=100"]
    began = time.monotonic()
    pids = ranks.start(project.folder, 2, *BASE, *argv, by_rank={1: {"OWN_FAILS": fails}})
    assert ranks.wait(pids) == [1, 1]
    assert time.monotonic() - began < 20  # not after the timeout
    assert message in (project.folder / "printed.txt").read_text()
    log = (project.folder / "run" / "log.txt").read_text()
    assert "in forward" in log or "in <lambda>" in log  # the traceback of where it happened
    saved = [path.name for path in (project.folder / "run" / "checkpoints").glob("step_*")]
    if how is FSDP:  # the other ranks hold shards of the weights
        assert ("ERROR Steps 1 to 4 are not saved; start anew" in log) == fails.endswith("@train")
        assert saved == []
    else:
        assert saved == [f"step_{4 if fails == 'hook@train' else 0:08d}"]
    assert json.loads((project.folder / "run" / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("how", [DDP, FSDP])
def test_buffers_are_those_of_rank_zero_so_a_resumed_run_is_the_same(ranks, project, how):
    argv = [how, "model._target_=own.Normed", "trainer.save_every=4", "trainer.eval_every=4"]
    ranks.run(project.folder, 2, *BASE, *argv, "hydra.run.dir=whole")
    ranks.run(project.folder, 2, *BASE, *argv, "hydra.run.dir=cut", typed="quit@5\n")
    ranks.run(project.folder, 2, *BASE, *argv, "resume=cut")
    assert find_difference(state_of(project.folder / "whole", 12), state_of(project.folder / "cut", 12)) is None
    names = ["eval/loss"]
    assert torch.equal(losses(project.folder / "whole", names), losses(project.folder / "cut", names))


def test_the_rendezvous_endpoint_is_not_read_from_a_saved_config(project):
    project.run("distributed=ddp", "hydra.run.dir=run", typed="quit@6\n")
    path = project.folder / "run" / ".hydra" / "config.yaml"
    text = path.read_text().replace("nnodes: 1", "nnodes: 2").replace("rdzv_endpoint: null", "rdzv_endpoint: evil:1")
    assert "evil:1" in text
    path.write_text(text)
    assert "Finished at step 12" in project.run("resume=run", "allow_targets=[own]")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (FSDP, "name it in distributed.strategy.forward_methods"),  # sharded weights are used outside forward
        (DDP, "does not depend on parameters second.weight, second.bias: freeze them, or set"),
    ],
)
def test_a_feeder_that_uses_a_part_of_the_model_is_reported_with_the_remedy(ranks, project, how, message):
    with open(project.folder / "own.py", "a") as file:
        file.write("\n\ndef by_part(module, batch):\n    return module.first(batch['x']).square().mean()\n")
    argv = [how, "feeder={_target_: own.by_part}", "hydra.run.dir=run"]
    assert message in ranks.run(project.folder, 2, *BASE, *argv, status=1)


def test_sharded_weights_are_not_saved_as_pt(ranks, project):
    printed = ranks.run(project.folder, 2, *BASE, FSDP, "checkpoint.format=pt", "hydra.run.dir=run", status=2)
    assert "checkpoint.format: weights that are spread over the ranks are stored as sft" in printed


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_in_the_store_of_torchruns_agent_is_one_error_and_executes_nothing(ranks, project):
    canary = project.folder / "canary"
    dist.PrefixStore("runner/planted", ranks.store).set("only", pickle.dumps(Canary(str(canary))))
    printed = ranks.run(project.folder, 2, *BASE, DDP, run_id="planted", restarts=1, status=2)
    assert printed.count("job: expected a run as rank 0 composed it, found no message") == 1
    assert "Traceback" not in printed
    assert not canary.exists()
