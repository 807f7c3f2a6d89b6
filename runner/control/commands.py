"""Typed commands: how a line is parsed, and the queue that holds commands until their step.

Callers pass the table of commands, `runner.control.handlers.COMMANDS`; this module imports the standard library only.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import IO, Any

from runner.control.stdin import READ_BYTES, LineReader, is_terminal_or_pipe, quote_typed, without_comment

MOST_PENDING = 1000  # commands that wait; then no line is read until some are done
_MOST_SHOWN = 20  # of the scheduled commands
_MAX_LINE = READ_BYTES // 4  # characters: a line cut at READ_BYTES is above it in any encoding of UTF-8


@dataclass(frozen=True)
class CommandSpec:
    """A row of the table of commands: the form of a command, its help and its handler.

    Args:
        form: an example of how it is typed.
        help: what it does, as `help` shows it.
        parse_argument: returns the argument from the words after the name, or raises ValueError; None if it has none.
        handler: called at a step boundary on every rank, as handler(handlers, loop, argument).
    """

    form: str
    help: str
    parse_argument: Callable[[list[str]], float | int | None] | None
    handler: Callable[[Any, Any, Any], None]


class CommandError(ValueError):
    """An invalid line; the message quotes it and names the nearest command and the remedy."""


@dataclass(frozen=True, slots=True)
class Command:
    """A parsed command; `str` returns its typed form.

    Args:
        argument: the rate of `lr`, the step of `time to`, None for the others.
        step: the number of finished steps at which it is due; None is the next step boundary.
    """

    name: str
    argument: float | int | None = None
    step: int | None = None

    def __str__(self) -> str:
        typed = self.name
        if self.argument is not None:
            typed += f" to {self.argument}" if self.name == "time" else f" {self.argument!r}"
        return typed if self.step is None else f"{typed}@{self.step}"


def parse(line: str, table: Mapping[str, CommandSpec]) -> Command:
    """Returns the command that a line holds; case, surplus blanks and text after a `#` are ignored.

    Args:
        table: the commands by name.
    Raises:
        CommandError: the line is not exactly one command.
    """
    typed = without_comment(line)
    if len(line) > _MAX_LINE:
        raise CommandError(f'{quote_typed(typed)} is too long, over {_MAX_LINE} characters; type "help" to see all')
    body, at, when = typed.lower().partition("@")
    name, *words = body.split() or [""]
    if name not in table:
        remedy = f'{_suggest_command(body, at + when, table)}; type "help" to see all'
        raise CommandError(f"{quote_typed(typed)} is no command; {remedy}")
    try:
        parse_argument = table[name].parse_argument
        if parse_argument is None and words:
            raise ValueError(f'"{name}" takes nothing but @STEP, found {quote_typed(" ".join(words))}')
        argument = None if parse_argument is None else parse_argument(words)
        return Command(name, argument, parse_step(when.strip()) if at else None)
    except ValueError as error:
        remedy = f'write {table[name].form}; type "help" to see all'
        raise CommandError(f"{quote_typed(typed)}: {error}; {remedy}") from None


def parse_step(word: str) -> int:
    """Returns the step that a word names, from 1 on.

    Raises:
        ValueError: the word names no step.
    """
    if re.fullmatch("[0-9]{1,18}", word) and int(word) >= 1:
        return int(word)
    raise ValueError(f"expected a step, a whole number from 1 on, found {quote_typed(word)}")


def _suggest_command(body: str, at_step: str, table: Mapping[str, CommandSpec]) -> str:
    """Names the nearest command, with the rest of the line if that is valid after it."""
    word = "".join(itertools.takewhile(str.isalpha, body))
    close = difflib.get_close_matches(word, table, n=1, cutoff=0.5)
    if not close:
        return f"there are {', '.join(table)}"
    rest = body[len(word) :].lstrip(" =:")
    with contextlib.suppress(CommandError):
        return f'the nearest is "{parse(close[0] + " " + rest + at_step, table)}"'
    return f'the nearest is "{close[0]}"'


class CommandQueue:
    """Commands typed during a run; the loop asks at each step boundary for those that are due.

    Args:
        table: the commands by name.
        answer: called with each message, from the reading thread and from callers of `start`, `submit` and `due`: it
            must be thread-safe.
        stream: read through its descriptor; None is `sys.stdin` at the time of `start`. A stream that is closed or has
            no descriptor is not read. In a run of many processes, one reads.
    """

    def __init__(
        self, table: Mapping[str, CommandSpec], answer: Callable[[str], None], *, stream: IO[Any] | None = None
    ) -> None:
        self._table = table
        self._answer = answer
        self._stream = stream
        self._reader: LineReader | None = None
        self._lock = threading.Lock()
        self._waiting: list[Command] = []  # in the order typed
        self._next_step = math.inf  # the earliest boundary with a due command; 0 is the next boundary
        self._step = 0  # the last boundary seen

    def start(
        self,
        step: int = 0,
        submit: Callable[[str], bool] | None = None,
        *,
        peeks: bool = False,
        warn: Callable[[str], None] | None = None,
        num_relayed: Callable[[], int] = int,
    ) -> None:
        """Starts to read; lines that are ready in a pipe or file are processed before it returns.

        Args:
            step: the number of finished steps.
            submit: called with each line in place of this object's `submit`, to relay it to all ranks.
            peeks: reads a terminal, and a pipe whose first line is a command, and nothing else.
            warn: called with the reason why a pipe is not read.
            num_relayed: returns the number of lines that are relayed and have not come back to this object's `submit`.
        """
        self._step = step
        stream = sys.stdin if self._stream is None else self._stream
        if self._reader is not None or stream is None:
            return
        try:
            fd = os.dup(stream.fileno())  # a copy, as the owner may close the original and its number be reused
        except (OSError, ValueError, AttributeError):
            return
        if peeks and not is_terminal_or_pipe(fd):
            os.close(fd)
            return

        def has_room(line: str) -> bool:
            # `quit` passes a full queue: a person must be able to end the run. It is no memory leak, as the reader
            # limits the lines per second and the run ends at the next boundary.
            return without_comment(line).lower() == "quit" or len(self._waiting) + num_relayed() < MOST_PENDING

        is_command = self.is_command if peeks else None
        self._reader = LineReader(fd, submit or self.submit, self._answer, is_command, warn, has_room)
        self._reader.start()

    def close(self) -> None:
        """Stops reading and leaves the stream open; `start` may follow, on this or another instance."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def due(self, step: int) -> list[Command]:
        """Returns, once and in the order typed, the commands that are due when `step` steps are finished.

        Equal commands that are due at once are returned once, except `lr`: repeating another has no effect.
        """
        self._step = step
        if step < self._next_step:
            return []
        with self._lock:
            due = [command for command in self._waiting if command.step is None or command.step <= step]
            self._set_waiting([c for c in self._waiting if c.step is not None and c.step > step])
        # Equal commands have one key, but for `lr`.
        by_key = {(command, index if command.name == "lr" else None): command for index, command in enumerate(due)}
        due = list(by_key.values())
        passed = [command for command in due if command.step is not None and command.step < step]
        for command in passed[:_MOST_SHOWN]:
            self._answer(f"step {command.step} has passed; now at {step}: {command} is done now")
        if len(passed) > _MOST_SHOWN:
            self._answer(f"... ({len(passed)} in all whose step has passed)")
        return due

    def submit(self, line: str) -> bool:
        """Queues the command of a line and answers it; returns False if the line is invalid, True if it is blank."""
        if not without_comment(line):
            return True
        try:
            command = parse(line, self._table)
            self._schedule(command)
        except CommandError as error:
            self._answer(str(error))
            return False
        if command.step is not None:
            self._answer(f"{replace(command, step=None)} at step {command.step}")
        return True

    @property
    def pending(self) -> tuple[Command, ...]:
        """The scheduled commands, by step; those of one step in the order typed."""
        with self._lock:
            scheduled = [command for command in self._waiting if command.step is not None]
        return tuple(sorted(scheduled, key=lambda command: command.step or 0))

    def state_dict(self) -> dict[str, list[str]]:
        """Returns the scheduled commands in their typed form."""
        return {"pending": [str(command) for command in self.pending]}

    def load_state_dict(self, state: dict[str, list[str]]) -> None:
        """Inserts saved commands before those typed here, which stay.

        Raises:
            ValueError: an entry is no command with a step; nothing is loaded then.
        """
        saved = [parse(line, self._table) for line in state["pending"]]
        if immediate := [str(command) for command in saved if command.step is None]:
            raise ValueError(f"pending commands: expected each with a step, as in eval@20, found {immediate}")
        with self._lock:
            self._set_waiting(saved + [command for command in self._waiting if command not in saved])

    def _schedule(self, command: Command) -> None:
        with self._lock:
            # due() stores its step, then reads `_next_step`; the order is reversed here, so that one of the two
            # threads always sees the other.
            earliest, self._next_step = self._next_step, 0
            step = self._step
            has_passed = command.step is not None and command.step <= step
            if not has_passed:
                self._waiting.append(command)
                earliest = min(earliest, command.step or 0)
            self._next_step = earliest
        if has_passed:
            now = replace(command, step=None)
            raise CommandError(f'step {command.step} has passed; now at {step}: type "{now}" to do it now')

    def _set_waiting(self, waiting: list[Command]) -> None:
        self._waiting = waiting
        self._next_step = min((command.step or 0 for command in waiting), default=math.inf)

    def is_command(self, line: str) -> bool:
        """Returns whether a line is exactly one command."""
        try:
            parse(line, self._table)
        except CommandError:
            return False
        return True
