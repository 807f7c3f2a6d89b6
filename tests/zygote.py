"""Imports everything once, and forks a `python -m runner` for each request, so that runs start fast.

Each line of stdin is a JSON object, answered by a line of stdout:

- A request for a run, answered with its pid: `argv`, `cwd`, `output` and `typed` (files), `environment` (added to this
  process's), `program` (the module whose `main` is called), and `crash_at`: the number of the file operation on
  checkpoints at which the child kills itself, 0 for none. With `forks_workers`, a launcher forks its workers instead of
  executing them. With `finalizes`, the child ends as Python does, which takes longer. The number of file operations is
  written to the file `output` + ".count" + rank.
- `{"wait": pid}` is answered with the wait status when the child ends. A child that does not end is killed.
- `{"poll": pid}` is answered at once, with "running" if the child has not ended.
- `{"load": modules}` imports modules.
"""

import fcntl
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import PIL.Image
import tensorboard.compat.proto.event_pb2
import torch
from hydra.core.plugins import Plugins

import runner.__main__
import runner.launch.command_line
import runner.run.run
import runner.tracking.event_file

LIMIT_S = 240.0
PIPE_BYTES = 1 << 16


class OperationCounter:
    """Counts file operations on checkpoints before they are done, and kills the process at one of them."""

    def __init__(self, crash_at: int, path: str | os.PathLike) -> None:
        self.crash_at, self.path, self.count = crash_at, path, 0
        sys.addaudithook(self.handle_event)

    def handle_event(self, event: str, args: tuple) -> None:
        if event != "runner.disk" or "checkpoints" not in os.fspath(args[1]):
            return
        self.count += 1
        if self.count == self.crash_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def write_count(self) -> None:
        with open(self.path, "w") as file:
            file.write(str(self.count))


def run_child(request: dict) -> None:
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    typed = os.open(os.devnull, os.O_RDONLY)
    if request["typed"]:
        content = Path(request["typed"]).read_bytes()
        typed, end = os.pipe()
        if len(content) > PIPE_BYTES:
            fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, len(content))  # everything is written before it is read
        os.write(end, content)
        os.close(end)
    for fd, source in ((0, typed), (1, output), (2, output)):
        os.dup2(source, fd)
    sys.stdout.reconfigure(line_buffering=True)
    sys.path.insert(0, request["cwd"])
    sys.argv = ["runner", *request["argv"]]
    gc.disable()  # as `python -m runner` does
    status = 0
    counter = OperationCounter(request["crash_at"], request["output"] + ".count" + os.environ.get("RANK", ""))
    if request["forks_workers"]:
        fork_workers()
    try:
        importlib.import_module(request.get("program", "runner.__main__")).main()
    except SystemExit as end:
        status = 0 if end.code is None else end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    counter.write_count()
    sys.stdout.flush()
    if request["finalizes"]:
        sys.exit(status)
    os._exit(status)


class ForkedWorker:
    """A worker forked from its launcher, with the methods of `Popen` that the elastic agent uses."""

    def __init__(self, args: tuple[str, ...], environment: dict[str, str]) -> None:
        assert args[1:3] == ("-P", "-c")
        assert args[3].endswith("worker.run_and_exit()")
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            self._run(args, environment)

    def _run(self, args: tuple[str, ...], environment: dict[str, str]) -> None:
        status = 1
        try:
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.setsid()
            os.closerange(3, 4096)
            os.environ.clear()
            os.environ.update(environment)
            from runner.launch import worker

            status = worker.main(Path(args[4]), int(args[5]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if found else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("worker", timeout)
            time.sleep(0.005)
        return status


def fork_workers() -> None:
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    SubprocessHandler._popen = lambda self, args, environment: ForkedWorker(args, environment)


def wait(pid: int) -> int:
    deadline = time.monotonic() + LIMIT_S
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


LAZY_MODULES = (  # imported in the middle of each run: a fifth of a short run's time
    "antlr4.LL1Analyzer", "numpy.typing", "omegaconf._impl", "runner.engines.optim.schedulers",
    "runner.tracking.media", "runner.utils.sampler.permutation", "runner.utils.sampler", "runner.utils.wrapper",
)  # fmt: skip


def load_for_children() -> None:
    for name in LAZY_MODULES:
        importlib.import_module(name)
    PIL.Image.init()
    Plugins.instance()


def main() -> None:
    torch.set_num_threads(1)
    load_for_children()
    assert {tensorboard, runner.tracking.event_file}  # imported for the children
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(wait(request["wait"]), flush=True)
            continue
        if "poll" in request:
            found, status = os.waitpid(request["poll"], os.WNOHANG)
            print(status if found else "running", flush=True)
            continue
        if "load" in request:
            for name in request["load"]:
                importlib.import_module(name)
            print("done", flush=True)
            continue
        gc.freeze()  # children need not search the imported objects for garbage, which would copy their memory
        pid = os.fork()
        if not pid:
            run_child(request)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
