"""The file `run.json` of a run: its status, times, host, code version and results."""

import contextlib
import json
import math
import os
import platform
import re
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

from runner.tracking.repair import is_step, is_time
from runner.utils.files import read_bounded, replace_file
from runner.utils.files.strict_json import parse_json

DISTRIBUTION = "exact-runner"  # this package, as pip knows it
_PACKAGES = ("torch", "numpy", "hydra-core", "tensorboard", "safetensors")
_GIT_TIMEOUT_S = 5.0
_SURVEY_WAIT_S = 1.0  # for the answer of git at the end of a run


class RunRecord:
    """The file `run.json` of a run's folder, complete at every moment.

    Its top level describes the run: `status` ("running", "finished", "quit", "interrupted", "preempted", "failed", or
    "crashed" if the process ended without writing one), `reason` (of an early end), `started` and `ended` (ISO 8601),
    `duration_s` of all sessions, `last_step`, `best` (its step is null without a checkpoint), and the latest session's
    host, pid, ranks, python, command, packages and git state. `sessions` has an entry for each start and each resume.

    Args:
        may_read_git: returns whether git may read a directory's repository.
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
        self.crashed: dict[str, Any] | None = None  # the last session, if its process ended without a status
        self.faults: list[str] = []  # values that `read` has left out

    def start_session(self, **facts: Any) -> None:
        """Adds a session to the record, and creates the file if there is none.

        A thread adds the git state and the package versions a moment later.

        Raises:
            ValueError: the existing run.json can't be read.
        """
        self._clock_zero = time.perf_counter()
        before = self.read()
        sessions = before.get("sessions", [])
        for session in sessions:
            if session["status"] == "running":  # its process has ended without writing another status
                session["status"] = "crashed"
                self.crashed = session
        now = _now()
        state = {"status": "running", "reason": None, "started": now, "ended": None, "duration_s": 0.0}
        process = {"host": socket.gethostname(), "pid": os.getpid(), "command": sys.argv, "git": None}
        self._session = state | process
        self._facts = {
            **state,
            "started": before.get("started", now),
            **process,
            "ranks": 1,
            "python": platform.python_version(),
            "packages": None,
            "last_step": before.get("last_step"),
            "best": before.get("best"),
            **facts,
            "sessions": [*sessions, self._session],
        }
        self._write()
        self._survey = threading.Thread(
            target=self._survey_environment, args=(os.getcwd(),), name="run record", daemon=True
        )
        self._survey.start()

    def update(self, **facts: Any) -> None:
        """Writes facts: `last_step=300`, `best={"name": ..., "value": ..., "step": ...}`."""
        with self._lock:
            self._facts.update(facts)
            if "last_step" in facts:
                self._session["last_step"] = facts["last_step"]
            self._write()

    def finish(self, status: str, reason: str | None = None, **facts: Any) -> None:
        """Writes the end of the session.

        Args:
            reason: of an early end.
            facts: as in `update`.
        """
        if self._survey is not None:
            self._survey.join(_SURVEY_WAIT_S)
        with self._lock:
            ending = {"status": status, "reason": reason, "ended": _now()}
            self._session.update(ending)
            self._facts.update(ending)
            self.update(**facts)
            self._is_over = True

    def _survey_environment(self, folder: str) -> None:
        packages = {"runner": find_version(DISTRIBUTION)} | {name: find_version(name) for name in _PACKAGES}
        git = _read_git(folder) if self._may_read_git(folder) else None
        with self._lock:
            if self._is_over:  # another session may write the file now
                return
            self._session["git"] = git
            with contextlib.suppress(OSError):  # the next call from the run raises it
                self.update(packages=packages, git=git)

    def _write(self) -> None:
        self._session["duration_s"] = round(time.perf_counter() - self._clock_zero, 3)
        self._facts["duration_s"] = round(sum(session["duration_s"] for session in self._facts["sessions"]), 3)
        text = json.dumps(_without_nan(self._facts), indent=2, allow_nan=False)
        replace_file(self._path, [text.encode(), b"\n"])

    def read(self) -> dict[str, Any]:
        """Returns the content of the file without invalid values, which `faults` names; empty if there is no file.

        Raises:
            ValueError: the file is no run.json.
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
        checked = [self._valid(session, _SESSION_KINDS, f"sessions.{i}") for i, session in enumerate(sessions)]
        return valid | {"sessions": [session for session in checked if session.keys() >= _SESSION_KINDS.keys()]}

    def _valid(self, values: Any, kinds: Mapping[str, Callable[[Any], bool]], path: str) -> dict[str, Any]:
        """Returns the values of an object that have the right kind, and adds the others to `faults`."""
        if not isinstance(values, dict):
            self.faults.append(f"{path}: {values!r:.60}")
            return {}
        for name in kinds.keys() - values.keys() if path else ():
            self.faults.append(f"{path}.{name}: nothing, so this session is left out")
        invalid = [name for name, is_kind in kinds.items() if name in values and not is_kind(values[name])]
        for name in invalid:
            self.faults.append(f"{path}.{name}: {values[name]!r:.60}".lstrip("."))
        return {name: value for name, value in values.items() if name not in invalid}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def find_run_id(record: Mapping[str, Any]) -> str | None:
    """Returns the id of a run from its run.json, or None; it is safe in a URL or a query."""
    run_id = record.get("id")
    return run_id if isinstance(run_id, str) and re.fullmatch(r"[a-z0-9]{1,64}", run_id) else None


def _is_object(value: Any) -> bool:
    return value is None or isinstance(value, dict)


_MAX_BYTES = 8 << 20
# The keys that are read of a run.json, and the checks of their values.
_KINDS: dict[str, Callable[[Any], bool]] = {
    "sessions": lambda value: isinstance(value, list),
    "started": _is_text,
    "last_step": lambda value: value is None or is_step(value),
    "best": _is_object,
    "git": _is_object,
}
_SESSION_KINDS: dict[str, Callable[[Any], bool]] = {
    "duration_s": lambda value: is_time(value) and value >= 0,
    "status": _is_text,
    "pid": lambda value: type(value) is int and 0 < value < 1 << 31,
    "host": _is_text,
}


def _read_git(folder: str) -> dict[str, Any] | None:
    """Returns the commit and whether files differ from it; None outside a repository or without git."""
    # The repository's config may name programs to run; `_may_read_git` excludes untrusted folders.
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
            check=True,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    lines = done.stdout.splitlines()
    commits = [line.removeprefix("# branch.oid ") for line in lines if line.startswith("# branch.oid ")]
    commit = commits[0] if commits and commits[0] != "(initial)" else None
    return {"commit": commit, "is_dirty": any(not line.startswith("#") for line in lines)}


def find_version(name: str) -> str | None:
    """Returns the version of an installed distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
