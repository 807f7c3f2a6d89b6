"""The stage of the attack tests: a user's project beside a hostile run folder, and what a command does there.

A trial puts a copy of a real run in place, has an attack change it, runs one command in a forked process, and compares
what is there afterwards: the user's files, the output, the memory and the processes.
"""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

from chaos import Zygote
from conftest import EXPERIMENT, Project
from processes import started_by

import runner
from attacks.plants import EXPORT, FORGED, SECRET, Attack

LIMIT_S = 20.0
MAX_PRINTED_BYTES = 64 << 10
MAX_PROCESSES = 8
MAX_MEMORY_KB = 3 << 19  # 1.5 GiB, of which the imported modules take a third
DATA_BYTES = 5 << 28  # 1.25 GiB more than at the start
_POLL_S = 0.01
_SAMPLE_S = 0.05
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_REPOSITORY = Path(runner.__file__).resolve().parents[1]

REPORT = """

def sound(module, dataset):
    from runner.tracking.media import Audio
    return {"number": 1.0, "words": "text", "original": Audio(torch.zeros(8), 8000)}
"""
SETTINGS = "{steps: 4, log_every: 1, save_every: 2, eval_every: 4, export_every: 4, keep_last: 0}"
MINE = ["--config-dir", "conf", "experiment=mine"]
SWEEP = ["-m", *MINE, "seed=1", "hydra.sweep.dir=sweep"]
STEP = "checkpoints/step_00000004"

# Command: the program, its arguments for the user's own run, and what is added for an untrusted one.
COMMANDS = {
    "resume": ("runner.__main__", ["resume=run", "trainer.steps=6"], [*MINE, "allow_targets=[own]"]),
    "resume_checkpoint": ("runner.__main__", [f"resume=run/{STEP}", "trainer.steps=6"], [*MINE, "allow_targets=[own]"]),
    "evaluate": ("runner.evaluate", ["run"], ["--allow-targets", "own"]),
    "evaluate_checkpoint": ("runner.evaluate", [f"run/{STEP}"], ["--allow-targets", "own"]),
    "evaluate_export": ("runner.evaluate", [f"run/{EXPORT}"], ["--allow-targets", "own"]),
    "export": ("runner.export", ["run"], ["--allow-targets", "own"]),
    "export_checkpoint": ("runner.export", [f"run/{STEP}"], ["--allow-targets", "own"]),
    "requeue": ("runner.__main__", [*MINE, "hydra.run.dir=run", "trainer.steps=6"], []),
    "restart": ("runner.__main__", [*MINE, "hydra.run.dir=run"], []),
    "sweep": ("runner.__main__", SWEEP, []),
    "inside_resume": ("runner", ["resume=.", "trainer.steps=6"], ["allow_targets=[own]"]),
    "inside_evaluate": ("runner.evaluate", ["."], ["--allow-targets", "own"]),
    "inside_export": ("runner.export", ["."], ["--allow-targets", "own"]),
    "harmful": ("attacks.harmful", [], []),
}


@dataclass
class Ending:
    """The end of a command: its status, output, memory and processes."""

    status: int | None
    printed: str
    peak_kb: int = 0
    num_processes: int = 0
    is_late: bool = False

    def find_faults(self) -> list[str]:
        """Returns the faults that are wrong for any command."""
        faults = ["the command line of the trial is wrong"] if self.printed.startswith("usage:") else []
        if self.is_late:
            faults.append("it did not end in time")
        elif self.status not in (0, 1, 2):
            faults.append(f"it ended with status {self.status}")
        if len(self.printed) > MAX_PRINTED_BYTES:
            faults.append(f"it printed {len(self.printed)} bytes")
        if self.peak_kb > MAX_MEMORY_KB:
            faults.append(f"it took {self.peak_kb} kB of memory")
        if self.num_processes > MAX_PROCESSES:
            faults.append(f"it started {self.num_processes} processes")
        return faults + find_in_text(self.printed, "it printed")


def find_in_text(text: str, where: str) -> list[str]:
    """Returns the faults of an output or a log: text that a hostile folder must not bring into it."""
    faults = [f"{where} a traceback"] if "Traceback" in text else []
    if found := _CONTROL.search(text):
        faults.append(f"{where} the control character {found.group()!r}")
    if re.search(rf"^{FORGED}", text, re.MULTILINE):
        faults.append(f"{where} a forged line")
    if SECRET in text:
        faults.append(f"{where} the secret of the environment")
    return faults


class Stage:
    """A project of a user's with a run, a sweep and other files; `folder` is where its commands are typed."""

    def __init__(self, root: Path) -> None:
        self.folder, self._root = root / "project", root
        self.limit_s = LIMIT_S
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        self._zygote = Zygote("attacks.composed", "runner.evaluate", "runner.export", "runner.run.saved_model")
        (root / "composed").mkdir()
        self.environment = self._make_project(self.folder)
        _make_decoy(self.folder / "decoy")
        self._run(["hydra.run.dir=other", "+model.width=4"])
        self._run(["hydra.run.dir=run"])
        shutil.copytree(self.folder / "run", self.folder / "decoy" / "copy", symlinks=True)
        self._keep("run", "own")
        self._finish(self._start("runner.__main__", SWEEP))
        for newest in (self.folder / "sweep").glob(f"*/{STEP}"):
            shutil.rmtree(newest)
        self._keep("sweep", "sweep")
        elsewhere = root / "elsewhere"
        untrusted = self._make_project(elsewhere)
        self._finish(self._start("runner.__main__", [*MINE, "hydra.run.dir=run"], elsewhere, untrusted))
        shutil.move(elsewhere / "run", root / "untrusted")
        shutil.copytree(self.folder, root / "kept", symlinks=True)
        self._before = self._survey()

    def _make_project(self, folder: Path) -> dict[str, str]:
        """Makes a user's project, with a home of its own; returns its environment."""
        folder.mkdir(parents=True)
        Project(folder)
        with (folder / "own.py").open("a") as file:
            file.write(REPORT)
        settings = re.sub(r"(?m)^trainer: .*$", f"trainer: {SETTINGS}", EXPERIMENT).replace("own.report", "own.sound")
        (folder / "conf" / "experiment" / "mine.yaml").write_text(settings)
        places = {"HOME": "home", "XDG_STATE_HOME": "state", "TMPDIR": "tmp"}
        for place in places.values():
            (folder / place).mkdir()
        of_home = {name: str(folder / place) for name, place in places.items()}
        return of_home | {"ATTACK_SECRET": SECRET, "XDG_CACHE_HOME": str(folder / "home")}

    def _run(self, overrides: list[str]) -> None:
        ending = self._finish(self._start("runner.__main__", [*MINE, *overrides]))
        assert ending.status == 0, ending.printed

    def _keep(self, name: str, kept: str) -> None:
        shutil.move(self.folder / name, self._root / kept)

    def attempt(self, attack: Attack, origin: str, command: str) -> tuple[Ending, list[str]]:
        """Tries one command on a hostile folder; returns its end and the faults.

        Args:
            origin: whose run the attack has changed: "own" or "untrusted".
        """
        run = self._put_run(attack, origin, command)
        beside = attack.plant(run, self.folder / "decoy")
        before = self._survey()
        log = _Growth(run / "log.txt")
        program, arguments, of_untrusted = COMMANDS[command]
        arguments = [*(of_untrusted if origin == "untrusted" else []), *arguments, *attack.arguments]
        try:
            if command.startswith("inside"):
                ending = self._run_afresh(program, arguments, run)
            else:
                environment = {"SLURM_RESTART_COUNT": "1"} if command in ("requeue", "restart") else {}
                pid = self._start(program, arguments, environment=environment, typed=attack.typed)
                ending = self._finish_beside(pid, beside)
            faults = ending.find_faults() + log.find_faults() + self._find_leaks(run)
            if ending.status == 0 and command in ("resume", "requeue", "sweep"):
                faults += find_in_lines(run / "metrics.jsonl")
            faults += self._find_changes(before)
        finally:
            self._clear()
        return ending, faults

    def _put_run(self, attack: Attack, origin: str, command: str) -> Path:
        if command == "sweep":
            shutil.copytree(self._root / "sweep", self.folder / "sweep", symlinks=True)
            (run,) = [path.parent for path in (self.folder / "sweep").glob("*/checkpoints")]
            return run
        run = self.folder / "run"
        shutil.copytree(self._root / origin, run, symlinks=True)
        if command == "restart":
            shutil.rmtree(run / "checkpoints")
            (run / "checkpoints").mkdir()
        return run

    def _start(self, program, arguments, cwd=None, environment=None, typed=None) -> int:
        keyboard = None
        if typed is not None:
            keyboard = self._root / "typed.txt"
            keyboard.write_bytes(typed)
        self._printed.unlink(missing_ok=True)
        settings = dict(os.environ) | self.environment | (environment or {})
        settings |= {"ATTACK_COMPOSED": str(self._root / "composed")}
        pid = self._zygote.start(
            cwd or self.folder, arguments, program=program, environment=settings, typed=keyboard, output=self._printed
        )
        limit_data(pid)
        return pid

    @property
    def _printed(self) -> Path:
        return self._root / "printed.txt"

    def _finish_beside(self, pid: int, beside) -> Ending:
        """Waits for a process while the attack goes on in a thread."""
        if not callable(beside):  # such as the number of bytes that a plant has written
            return self._finish(pid)
        is_over = threading.Event()
        thread = threading.Thread(target=beside, args=(is_over,))
        thread.start()
        try:
            return self._finish(pid)
        finally:
            is_over.set()
            thread.join()

    def _finish(self, pid: int) -> Ending:
        ending = watch(pid, lambda: self._zygote.poll(pid), self.limit_s)
        ending.printed = self._printed.read_bytes().decode(errors="surrogateescape") if self._printed.exists() else ""
        return ending

    def _run_afresh(self, program: str, arguments: list[str], cwd: Path) -> Ending:
        """Runs an installed command, as its script does, in a new interpreter that stands in a folder."""
        module, _, function = find_entry(program).partition(":")
        script = f"import sys; sys.argv = {[program, *arguments]!r}; from {module} import {function} as main; main()"
        path = os.pathsep.join([str(_REPOSITORY), str(self.folder)])
        settings = dict(os.environ) | self.environment | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        with self._printed.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", script], cwd=cwd, env=settings, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            ending = watch(process.pid, process.poll, self.limit_s)
        ending.printed = self._printed.read_bytes().decode(errors="surrogateescape")
        return ending

    def _survey(self) -> dict[str, tuple]:
        """Returns all that the user has beside the hostile folder."""
        left_out = {"run", "sweep", "tmp"}
        return {
            str(path.relative_to(self.folder)): _describe(path)
            for top in sorted(self.folder.iterdir())
            if top.name not in left_out
            for path in (top, *sorted(top.rglob("*")))
        }

    def _find_changes(self, before: dict[str, tuple]) -> list[str]:
        after = self._survey()
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        faults = ["the canary ran"] if "decoy/canary" in after else []
        return faults + [f"it changed {', '.join(changed[:5])}"] * bool(changed)

    def _find_leaks(self, run: Path) -> list[str]:
        """Returns the files of the run that contain the secret of the environment."""
        files = [path for path in run.rglob("*") if stat.S_ISREG(path.lstat().st_mode)]
        small = [path for path in files if path.lstat().st_size < 1 << 20]
        return [f"{path.relative_to(run)} holds the secret" for path in small if SECRET.encode() in path.read_bytes()]

    def _clear(self) -> None:
        """Removes the hostile folder, and puts back what was changed beside it."""
        for name in ("run", "sweep"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        if self._survey() == self._before:
            return
        for top in self.folder.iterdir():
            shutil.rmtree(top) if top.is_dir() and not top.is_symlink() else top.unlink()
        shutil.copytree(self._root / "kept", self.folder, symlinks=True, dirs_exist_ok=True)
        self._before = self._survey()

    def close(self) -> None:
        """Ends the process that commands are forked from."""
        self._zygote.close()


def limit_data(pid: int) -> None:
    """Limits the memory of a process, so that an endless growth ends it before the machine has none left."""
    with contextlib.suppress(OSError, ProcessLookupError):
        (used,) = re.findall(r"VmData:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()) or [0]
        limit = int(used) * 1024 + DATA_BYTES
        resource.prlimit(pid, resource.RLIMIT_DATA, (limit, limit))


def watch(pid: int, poll, limit_s: float) -> Ending:
    """Waits until a process ends, or ends it with all that it started; notes its memory and processes meanwhile."""
    ending = Ending(None, "")
    deadline, due = time.monotonic() + limit_s, 0.0
    while (status := poll()) is None:
        now = time.monotonic()
        if now > due:
            due = now + _SAMPLE_S
            ending.peak_kb = max(ending.peak_kb, _read_peak_kb(pid))
            ending.num_processes = max(ending.num_processes, len(started_by(pid)))
        is_growing = ending.num_processes > MAX_PROCESSES or ending.peak_kb > MAX_MEMORY_KB
        ending.is_late |= now > deadline
        if ending.is_late or is_growing:
            for process in [pid, *started_by(pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        time.sleep(_POLL_S)
    ending.status = status
    return ending


def _read_peak_kb(pid: int) -> int:
    try:
        found = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[0]) if found else 0


def find_entry(program: str) -> str:
    """Returns what the installed command of a module calls, as `module:function`."""
    scripts = tomllib.loads((_REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    name = program.replace(".", "-")
    return scripts.get(name, f"{program}:main")


def find_in_lines(path: Path) -> list[str]:
    """Returns the faults of a resumed run's numbers: each line must be JSON without infinities."""
    if not path.is_file() or path.is_symlink():
        return []
    try:
        for line in path.read_text().splitlines():
            json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        return [f"metrics.jsonl still holds a line that is no record: {error}"[:200]]
    return []


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


class _Growth:
    """The text that is appended to a log after an attack."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = path.lstat().st_size if self._is_regular() else 0

    def _is_regular(self) -> bool:
        return os.path.lexists(self._path) and stat.S_ISREG(self._path.lstat().st_mode)

    def find_faults(self) -> list[str]:
        if not self._is_regular():
            return []
        with self._path.open("rb") as file:
            file.seek(self._size)
            text = file.read(1 << 20).decode(errors="surrogateescape")
        return find_in_text(text, "log.txt has")


def _describe(path: Path) -> tuple:
    found = path.lstat()
    content: str | bytes = b""
    if path.is_symlink():
        content = os.readlink(path)
    elif stat.S_ISREG(found.st_mode):
        content = path.read_bytes()
    return stat.filemode(found.st_mode), found.st_size, found.st_mtime_ns, content


def _make_decoy(folder: Path) -> None:
    """Makes the files of a user that no command on a hostile folder may touch."""
    (folder / "notes").mkdir(parents=True)
    (folder / "bashrc").write_text("# the user's own\n")
    (folder / "diary.txt").write_text("dear diary\n")
    (folder / "notes" / "idea.txt").write_text("an idea\n")
    (folder / "tool").write_text("#!/bin/sh\n")
    (folder / "tool").chmod(0o755)
