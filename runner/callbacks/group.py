"""The callbacks of a run, called in the order of the config."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from runner.callbacks.protocol import HOOKS
from runner.callbacks.run_view import RunView
from runner.utils.distributed import RankError, RankLostError
from runner.utils.train.failures import TrainingStopped
from runner.utils.utils import describe, is_signal, suggest


class CallbackError(RuntimeError):
    """An error of a callback; the message names the callback and its hook, and the cause has the traceback."""


def check_callback(callback: Any) -> None:
    """Checks the methods of a callback.

    Raises:
        TypeError: it has no hook, or a method whose name begins with on_ and is none.
    """
    kind = type(callback).__name__
    methods = [name for name in dir(callback) if name.startswith("on_") and callable(getattr(callback, name))]
    for name in methods:
        if name not in HOOKS:
            raise TypeError(f"{kind}.{name}: no such hook; {suggest(name, list(HOOKS))}")
    if not methods:
        raise TypeError(f"expected an object with one of the methods {', '.join(HOOKS)}; found {kind}, which has none")
    if hasattr(callback, "state_dict") is not hasattr(callback, "load_state_dict"):
        raise TypeError(f"{kind}: expected both state_dict and load_state_dict, or neither; found one of them")


class CallbackGroup:
    """Callbacks by name. Once a hook has failed, no hook is called any more, so that the run can be saved."""

    def __init__(self, callbacks: Mapping[str, Any]) -> None:
        self._callbacks = dict(callbacks)
        self._has_failed = False

    def defines(self, hook: str) -> bool:
        """Returns whether a callback has that hook."""
        return any(hasattr(callback, hook) for callback in self._callbacks.values())

    def call(self, hook: str, view: RunView, *arguments: Any) -> None:
        """Calls a hook of each callback that has it.

        Raises:
            CallbackError: a hook raised an error.
            TrainingStopped: a hook raised it for a mistake of the user's.
        """
        for name, callback in self._callbacks.items():
            if self._has_failed or not hasattr(callback, hook):
                continue
            view.enter(name, hook)
            try:
                getattr(callback, hook)(view, *arguments)
            except BaseException as error:
                is_shared = isinstance(error, RankError | RankLostError | InterruptedError)  # all ranks know it
                if is_signal(error) or is_shared:
                    raise
                self._has_failed = True
                if isinstance(error, TrainingStopped):
                    error.args = (f"callbacks.{name}: {error}",)
                    raise
                raise CallbackError(f"callbacks.{name}.{hook}: {describe(error)}") from error

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of the callbacks that have one, by name."""
        states = {}
        for name, callback in self._callbacks.items():
            if hasattr(callback, "state_dict"):
                try:
                    states[name] = callback.state_dict()
                except Exception as error:
                    raise CallbackError(f"callbacks.{name}.state_dict: {describe(error)}") from error
        return states

    def load_state_dict(self, saved: Mapping[str, Any]) -> list[str]:
        """Loads saved states; returns a note for each callback that starts anew or is gone.

        Raises:
            ValueError: a callback refuses its state.
        """
        notes = []
        for name, callback in self._callbacks.items():
            if not hasattr(callback, "load_state_dict"):
                continue
            if name not in saved:
                notes.append(f"callbacks.{name}: the checkpoint has no state of it; it starts anew")
                continue
            try:
                callback.load_state_dict(copy.copy(saved[name]))
            except Exception as error:
                raise ValueError(f"callbacks.{name}: its saved state does not fit: {describe(error)}") from error
        gone = [name for name in saved if not hasattr(self._callbacks.get(name), "load_state_dict")]
        return notes + [f"callbacks.{name}: it is not configured any more; its saved state is dropped" for name in gone]
