"""Errors of a dataset in `python -m runner.evaluate`, with loader workers and without."""

import subprocess
import sys

import pytest

FAILING = """

import resource

LEAKED = []


class Failing(Data):
    def __init__(self, length=50, kind="", num_leaked=0, kills=False):
        super().__init__(length)
        self.kind, self.num_leaked, self.kills = kind, num_leaked, kills
        if num_leaked:
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    def __getitem__(self, index):
        LEAKED.extend(open("/dev/null") for _ in range(self.num_leaked))
        if index == 3 and self.kind:
            raise {"value": ValueError("bad"), "key": KeyError("gone"), "eof": EOFError("cut")}[self.kind]
        if index == 3 and self.kills:
            os.kill(os.getpid(), 9)
        return super().__getitem__(index)
"""


@pytest.fixture
def failing(trained):
    with (trained.folder / "own.py").open("a") as file:
        file.write(FAILING)
    return trained


def evaluate(project, *overrides):
    """Returns the exit status and what was printed."""
    argv = [sys.executable, "-m", "runner.evaluate", "run", "--allow-targets", "own", "data.eval._target_=own.Failing"]
    argv += ["data.batch_size=4", *overrides]
    done = subprocess.run(
        argv, cwd=project.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(("kind", "told"), [("value", "ValueError: bad"), ("eof", "EOFError: cut")])
def test_an_error_of_the_dataset_is_shown_once_with_its_index(failing, num_workers, kind, told, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # nobody has signed the run: else it is one line
    status, printed = evaluate(failing, f"data.num_workers={num_workers}", f"+data.eval.kind={kind}")
    assert status == 1
    assert printed.count("at index 3 of the dataset Failing, position 3 of the order") == 1
    assert told in printed
    assert sum(line.startswith("Traceback") for line in printed.splitlines()) == 1


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_open_files_are_told_in_one_message_with_the_remedy(failing, num_workers):
    status, printed = evaluate(failing, f"data.num_workers={num_workers}", "+data.eval.num_leaked=20")
    assert status == 2
    assert "Traceback" not in printed
    assert "Too many open files in the evaluation: at most 256 may be open; raise the limit (ulimit -n)" in printed


def test_a_worker_that_dies_is_told_in_one_message(failing):
    status, printed = evaluate(failing, "data.num_workers=1", "+data.eval.kills=true")
    assert status == 2
    assert "Traceback" not in printed
    assert "A loader worker died in the evaluation: DataLoader worker (pid" in printed
