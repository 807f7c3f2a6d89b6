"""What is to be done at step boundaries, in which order, and what of it is still owed. Standard library alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Action:
    """Something done every `every` steps and at the end; 0 switches it off.

    `do` raises InterruptedError where the loop is stopping and it had to leave off: it is then owed.
    """

    do: Callable[[], None]
    every: int

    def is_due(self, step: int, is_last: bool) -> bool:
        """Says whether the boundary after `step` is one of its own."""
        return self.every > 0 and (is_last or step % self.every == 0)


class Agenda:
    """Actions by name, in the order they are done at a boundary, and the names of those owed."""

    def __init__(self, actions: Mapping[str, Action]) -> None:
        self.actions = dict(actions)
        self.owed: list[str] = []

    def owe(self, name: str) -> None:
        """Owes an action, beside those that are due."""
        self.owed.append(name)

    def add_due(self, step: int, is_last: bool, typed: Collection[str]) -> bool:
        """Owes each action that was typed or is due, once; returns whether anything is owed."""
        for name, action in self.actions.items():
            if name in typed or action.is_due(step, is_last):
                self.owed.append(name)
        return bool(self.owed)

    def do_owed(self, do: Callable[[str], None], is_stopping: Callable[[], bool]) -> None:
        """Does what is owed, in order, until the loop is stopping; what was not done to its end stays owed."""
        while self.owed and not is_stopping():
            try:
                do(self.owed[0])
            except InterruptedError:
                return
            self.owed.pop(0)

    def state_dict(self) -> list[str]:
        """Returns the names owed: nothing where it is the save alone, which is what asks."""
        return [] if set(self.owed) <= {"save"} else list(self.owed)
