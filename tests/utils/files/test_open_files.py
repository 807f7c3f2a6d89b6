import contextlib
import errno
import os
import resource
from multiprocessing import get_context
from multiprocessing.util import get_temp_dir

import pytest
import torch
from conftest import read_metrics

from runner.checkpoint import checkpoints
from runner.utils.files.open_files import (
    DescriptorReserve,
    exit_worker_at_file_limit,
    is_out_of_files,
    unshare_file_offsets,
)
from runner.utils.train.failures import TrainingStopped, describe_failure


def raised_from(cause):
    try:
        raise KeyError("x") from cause
    except KeyError as error:
        return error


REAL = [
    OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/dev/null"),
    OSError(errno.ENFILE, os.strerror(errno.ENFILE)),
    RuntimeError("received 0 items of ancdata"),
    OSError("Caught OSError in DataLoader worker process 0.\nOSError: [Errno 24] Too many open files: 'a'"),
    RuntimeError("unable to open shared memory object </torch_1_2_3> in read-write mode: Too many open files (24)"),
    RuntimeError("DataLoader worker (pid 7) exited unexpectedly with exit code 24. Details are lost"),
    raised_from(OSError(errno.EMFILE, "x")),
]


@pytest.mark.parametrize("error", REAL, ids=str)
def test_an_error_of_too_many_open_files_is_told_with_the_limit_and_a_remedy(error):
    told = describe_failure(error, "in step 3", torch.device("cpu"))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert told.startswith(f"Too many open files in step 3: at most {limit} may be open; raise the limit (ulimit -n)")
    assert "data.num_workers=0" in told


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "x"), FileNotFoundError("a"), RuntimeError("exit code 1"), KeyError("ancdata")]
)
def test_another_error_is_none_of_it(error):
    assert not is_out_of_files(error)
    assert describe_failure(error, "in step 3", torch.device("cpu")) is None


def test_what_was_explained_is_not_explained_again():
    halt = TrainingStopped("Too many open files")
    halt.__cause__ = REAL[0]
    assert describe_failure(halt, "after step 3", torch.device("cpu")) is None


def num_open():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts the descriptors that Linux lists")
def test_a_reserve_gives_its_files_back_and_a_full_process_can_hold_none():
    before, reserve = num_open(), DescriptorReserve()
    reserve.open()
    assert num_open() >= before + 8
    reserve.close()
    reserve.close()
    assert num_open() == before


def leak_all_files(connection):
    exit_worker_at_file_limit(0)
    connection.send(get_temp_dir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with contextlib.suppress(OSError):
        while True:
            os.open(os.devnull, os.O_RDONLY)


def test_a_worker_without_files_removes_its_temporary_folder_at_its_end(capfd):
    receiver, sender = get_context("fork").Pipe(duplex=False)
    worker = get_context("fork").Process(target=leak_all_files, args=(sender,))
    worker.start()
    folder = receiver.recv()
    worker.join()
    assert worker.exitcode == 0
    assert not os.path.exists(folder)
    assert "Traceback" not in capfd.readouterr().err


def read_on(files, connection):
    unshare_file_offsets()
    connection.send([file.read(2) for file in files.values()])
    files["appended"].write(b"child")
    connection.recv()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reopens the files that Linux lists")
def test_a_forked_process_goes_on_from_the_same_position_and_moves_none_of_its_parent(tmp_path):
    modes = {"read": "rb", "written": "r+b", "deleted": "rb"}
    for name in modes:
        (tmp_path / name).write_bytes(b"0123456789")
    modes["appended"] = "a+b"
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(tmp_path / name, mode, buffering=0)) for name, mode in modes.items()}
        (tmp_path / "deleted").unlink()
        for file in files.values():
            file.seek(3)
        ours, theirs = get_context("fork").Pipe()
        child = get_context("fork").Process(target=read_on, args=(files, theirs))
        child.start()
        assert ours.recv() == [b"34", b"34", b"34", b""]
        assert [file.tell() for file in files.values()] == [3, 3, 3, 3]
        ours.send(None)
        child.join()
        files["appended"].write(b"parent")
    assert (tmp_path / "appended").read_bytes() == b"childparent"


FILES = """

import resource


def limit():
    resource.setrlimit(resource.RLIMIT_NOFILE, (130, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


LEAKED = []


class Keeping(nn.Module):
    def __init__(self, leaks=False):
        super().__init__()
        self.w, self.kept, self.leaks = nn.Parameter(torch.zeros(())), [], leaks
        limit()

    def forward(self, **parts):
        if self.leaks:
            LEAKED.extend(open("/dev/null") for _ in range(9))
        self.kept.append(parts)
        return (self.w - sum(part.mean() for part in parts.values())).square()


class Wide(torch.utils.data.Dataset):
    def __init__(self, length=64, width=1, num_leaked=0, num_opened=0, size=3):
        self.width, self.num_leaked, self.size = width, num_leaked, size
        if num_opened:
            limit()
        self.opened = [open("/dev/null") for _ in range(num_opened)]

    def __len__(self):
        return 64

    def __getitem__(self, index):
        LEAKED.extend(open("/dev/null") for _ in range(self.num_leaked))
        return {str(part): torch.ones(self.size) * index for part in range(self.width)}
"""

LACKS = {
    # Large tensors: small ones need no file on their way from a worker.
    "batches of workers are kept": ["+data.train.width=20", "+data.train.size=50000", "data.num_workers=1"],
    "a worker has too few to send a batch": [
        "+data.train.width=150",
        "+data.train.size=50000",
        "data.num_workers=1",
    ],
    "the dataset leaks in a worker": ["+data.train.num_leaked=1", "data.num_workers=1"],
    "the dataset leaks": ["+data.train.num_leaked=1"],
    "the model leaks": ["+model.leaks=true"],
    "the evaluation's dataset leaks": [
        "data.eval._target_=own.Wide",
        "+data.eval.num_leaked=3",
        "trainer.eval_every=2",
    ],
}


@pytest.fixture
def limited(project):
    with (project.folder / "own.py").open("a") as file:
        file.write(FILES)
    return project


@pytest.mark.parametrize("lack", LACKS)
def test_a_run_without_a_file_left_saves_what_it_has_done_and_tells_the_remedy(limited, lack):
    argv = ["model._target_=own.Keeping", "data.train._target_=own.Wide", "data.eval._target_=own.Wide"]
    argv += ["trainer.eval_every=0", "trainer.steps=100", "trainer.save_every=0", "hydra.run.dir=run"]
    printed = limited.run(*argv, *LACKS[lack], status=1)
    assert printed.count("error: The run ends: ") == 1
    assert "at most 130 may be open; raise the limit (ulimit -n)" in printed.partition("error: The run ends: ")[2]
    assert "Traceback" not in printed
    (saved,) = (limited.folder / "run" / "checkpoints").glob("step_*")
    done = [line["step"] for line in read_metrics(limited.folder / "run") if "train/loss" in line]
    assert checkpoints.load(saved)[checkpoints.FACTS]["loop"]["step"] == max(done, default=0)


def test_a_dataset_that_opens_too_many_files_at_start_is_told_by_its_key(limited):
    printed = limited.run("data.train._target_=own.Wide", "+data.train.num_opened=200", status=2)
    assert (
        "data.train: [Errno 24] Too many open files: '/dev/null'; at most 130 may be open; raise the limit" in printed
    )
