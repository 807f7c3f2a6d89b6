"""A run's `run.json`: what ran, where, from which code, and how it went.

It must not import torch, Hydra, OmegaConf, `build` or anything above.
"""

import contextlib
import json
import math
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from runner.utils.files import read_bounded, replace_file
from runner.utils.files.strict_json import parse_json

DISTRIBUTION = "exact-runner"  # this package, as pip knows it
_PACKAGES = ("torch", "numpy", "hydra-core", "tensorboard", "safetensors")
_GIT_TIMEOUT_S = 5.0
_SURVEY_WAIT_S = 1.0  # at the end of a run, for git to have answered


class RunRecord:
    """The file `run.json` of a run's folder, whole at every moment.

    Its top level tells of the run: `status` ("running", "finished", "quit", "interrupted", "preempted",
    "failed", or "crashed" where the process has gone without a word), `reason` (what ended it early), `started` and
    `ended` (ISO 8601), `duration_s` of all sessions, `last_step`, `best` (its step null
    without a checkpoint), and the latest session's host, pid,
    ranks, python, command, packages and git state. `sessions` has an entry for each start and each resume.

    Args:
        may_read_git: says whether git may read a directory's repository.
    """

    def __init__(self, folder: str | Path, may_read_git: Callable[[str], bool]) -> None:
        self._path = Path(folder) / "run.json"
        self._may_read_git = may_read_git
        self._lock = threading.RLock()
        self._facts: dict[str, Any] = {}
        self._session: dict[str, Any] = {}
        self._clock_zero = 0.0
        self._survey: threading.Thread | None = None
        self._is_over = False
        self.crashed: dict[str, Any] | None = None
        self.faults: list[str] = []  # what `read` has left out

    def start(self, **facts: Any) -> None:
        """A session of the run has begun; a run.json that lies there is of the same run, and goes on.

        The git state and the package versions follow a moment later, from a thread. `crashed` is then the last
        session, if its process has gone without a word.

        Raises: ValueError when the run.json that lies there can't be read.
        """
        self._clock_zero = time.perf_counter()
        before = self.read()
        sessions = before.get("sessions", [])
        for session in sessions:
            if session["status"] == "running":  # its process is gone: who lives to the end says how it ended
                session["status"] = "crashed"
                self.crashed = session
        now = _now()
        state = {"status": "running", "reason": None, "started": now, "ended": None, "duration_s": 0.0}
        place = {"host": socket.gethostname(), "pid": os.getpid(), "command": sys.argv, "git": None}
        self._session = state | place
        self._facts = state | {"started": before.get("started", now)} | place
        self._facts |= {"ranks": 1, "python": platform.python_version(), "packages": None}
        self._facts |= {"last_step": before.get("last_step"), "best": before.get("best")}
        self._facts |= facts | {"sessions": [*sessions, self._session]}
        self._write()
        self._survey = threading.Thread(target=self._look_around, args=(os.getcwd(),), name="run record", daemon=True)
        self._survey.start()

    def update(self, **facts: Any) -> None:
        """The facts stand in the file: `last_step=300`, `best={"name": ..., "value": ..., "step": ...}`."""
        with self._lock:
            self._facts.update(facts)
            if "last_step" in facts:
                self._session["last_step"] = facts["last_step"]
            self._write()

    def finish(self, status: str, reason: str | None = None, **facts: Any) -> None:
        """The session has ended with a status; a reason says what ended it early; the facts are as in `update`."""
        if self._survey is not None:
            self._survey.join(_SURVEY_WAIT_S)
        with self._lock:
            ending = {"status": status, "reason": reason, "ended": _now()}
            self._session.update(ending)
            self._facts.update(ending)
            self.update(**facts)
            self._is_over = True

    def _look_around(self, folder: str) -> None:
        packages = {"runner": _find_version(DISTRIBUTION)} | {name: _find_version(name) for name in _PACKAGES}
        git = _read_git(folder) if self._may_read_git(folder) else None
        with self._lock:
            if self._is_over:  # and the folder no longer this session's to write to
                return
            self._session["git"] = git
            with contextlib.suppress(OSError):  # who can't write it is told by the next who writes
                self.update(packages=packages, git=git)

    def _write(self) -> None:
        self._session["duration_s"] = round(time.perf_counter() - self._clock_zero, 3)
        self._facts["duration_s"] = round(sum(each["duration_s"] for each in self._facts["sessions"]), 3)
        text = json.dumps(_without_nan(self._facts), indent=2, allow_nan=False)
        replace_file(self._path, [text.encode(), b"\n"])

    def read(self) -> dict[str, Any]:
        """Returns what lies there but for values of a kind that no run writes, which `faults` names; or nothing.

        Raises:
            ValueError: it is no run.json.
        """
        if not os.path.lexists(self._path):
            return {}
        try:
            content = parse_json(read_bounded(self._path, _MAX_BYTES))
            if not isinstance(content, dict):
                raise ValueError(f"expected an object, found {type(content).__name__}")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(
                f"{self._path}: not the record of a run ({reason}); move it away to resume the run"
            ) from None
        self.faults = []
        valid = self._valid(content, _KINDS, "")
        sessions = valid.get("sessions", [])
        own = [self._valid(each, _SESSION_KINDS, f"sessions.{i}") for i, each in enumerate(sessions)]
        return valid | {"sessions": [session for session in own if session.keys() >= _SESSION_KINDS.keys()]}

    def _valid(self, values: Any, kinds: Mapping[str, Callable[[Any], bool]], place: str) -> dict[str, Any]:
        """Returns those of an object's values that are of their kinds; notes the others."""
        if not isinstance(values, dict):
            self._note(place, values)
            return {}
        for name in kinds.keys() - values.keys() if place else ():
            self.faults.append(f"{place}.{name}: nothing, so this session is left out")
        invalid = [name for name, is_kind in kinds.items() if name in values and not is_kind(values[name])]
        for name in invalid:
            self._note(f"{place}.{name}".lstrip("."), values[name])
        return {name: value for name, value in values.items() if name not in invalid}

    def _note(self, place: str, value: Any) -> None:
        self.faults.append(f"{place}: {value!r:.60}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_pid(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_duration(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < _MAX_DURATION_S


def _is_step(value: Any) -> bool:
    return value is None or (type(value) is int and 0 <= value < _MAX_STEP)


def _is_object(value: Any) -> bool:
    return value is None or isinstance(value, dict)


_MAX_BYTES = 8 << 20
_MAX_DURATION_S, _MAX_STEP = 1e12, 1 << 53
# What is read of a run.json, by what it has to be.
_KINDS: dict[str, Callable[[Any], bool]] = {
    "sessions": lambda value: isinstance(value, list),
    "started": _is_text,
    "last_step": _is_step,
    "best": _is_object,
    "git": _is_object,
}
_SESSION_KINDS: dict[str, Callable[[Any], bool]] = {
    "duration_s": _is_duration,
    "status": _is_text,
    "pid": _is_pid,
    "host": _is_text,
}


def _read_git(folder: str) -> dict[str, Any] | None:
    """The commit and whether anything differs from it; None outside a repository or without git."""
    # The repository's own config may name programs; `_may_read_git` leaves out untrusted folders.
    safe = ["-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}"]
    command = ["git", *safe, "--no-optional-locks", "status", "--porcelain=v2", "--branch"]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    if done.returncode:
        return None
    lines = done.stdout.splitlines()
    found = [line.removeprefix("# branch.oid ") for line in lines if line.startswith("# branch.oid ")]
    commit = found[0] if found and found[0] != "(initial)" else None
    return {"commit": commit, "is_dirty": any(not line.startswith("#") for line in lines)}


def _find_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
