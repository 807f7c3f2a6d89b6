"""The Protocol of a callback. All methods are optional, and there is no base class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from runner.callbacks.run_view import RunView

HOOKS = ("on_start", "on_step", "on_evaluate", "on_save", "on_end")


class Callback(Protocol):
    """An object with any of these methods.

    Every rank calls the hooks of all callbacks in the order of the config, so a hook may use collectives. A hook that
    draws random numbers must seed them itself.
    """

    def on_start(self, view: RunView) -> None:
        """Called before the first step of each session, also of one that resumes (`view.is_resumed`)."""

    def on_step(self, view: RunView) -> None:
        """Called after each step that updated an engine, before the actions that are due after it.

        A discarded or skipped step has no call.
        """

    def on_evaluate(self, view: RunView, numbers: Mapping[str, float]) -> None:
        """Called after an evaluation whose numbers are logged; they are the same on all ranks.

        An evaluation that is interrupted before the next checkpoint is repeated when the run resumes.
        """

    def on_save(self, view: RunView) -> None:
        """Called before the state is copied for a checkpoint; changes made here are in the checkpoint."""

    def on_end(self, view: RunView, status: str) -> None:
        """Called at the end of each session, after the last save.

        Args:
            status: finished, quit, interrupted, preempted or failed. If it is failed, other ranks may be gone.
        """

    def state_dict(self) -> Mapping[str, Any]:
        """Returns the state to save: any nest that a checkpoint can hold. That of rank zero is saved."""
        ...

    def load_state_dict(self, state: Any) -> None:
        """Loads a saved state, before `on_start`; not called if the checkpoint has none for this callback."""
