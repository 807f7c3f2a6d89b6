"""The optimizations applied to one module: their start-up table, first-step checks, exports and undo."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from runner.utils.modules.frozen import FrozenModules
from runner.utils.modules.selection import split_uncalled
from runner.utils.modules.weights import load_weights
from runner.utils.wrapper.protocol import Applied, Export, FirstStepMonitor, Load, make_row, shorten


class AppliedOptimizations:
    """The optimizations applied to a module, in order.

    Made before the first is applied: `frozen` records which modules are frozen, and in evaluation mode, from the start.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.frozen = FrozenModules(module)
        self.rows: list[tuple[str, str]] = []
        self.monitors: list[FirstStepMonitor] = []
        self.reserved: set[str] = set()
        self.is_compiled = False
        self._expected: dict[str, str] = {}  # optimization by the name of a module that must be called
        self._was_called: dict[str, Callable[[str], bool]] = {}  # by optimization
        self._called: set[str] = set()
        self._hooks: dict[str, RemovableHandle] = {}
        self._undo = contextlib.ExitStack()
        self._exports: list[Export] = []
        self._load: Load | None = None
        self._files: Export | None = None

    def add(self, name: str, changes: Applied, kind: str) -> None:
        """Adds the changes of one optimization.

        Args:
            name: of the optimization in the config.
            kind: its class, for the start-up table.
        """
        if changes.undo is not None:
            self._undo.callback(changes.undo)
        self.rows += changes.rows or [(name, kind)]
        by_reason: dict[str, list[str]] = {}
        for module, reason in changes.skipped.items():
            by_reason.setdefault(reason, []).append(module)
        self.rows += [(f"{name}, skipped", f"{shorten(modules)}: {reason}") for reason, modules in by_reason.items()]
        self._expected |= dict.fromkeys(changes.expected, name)
        if changes.was_called is not None:
            self._was_called[name] = changes.was_called
        self.is_compiled |= changes.is_compiled
        self.frozen.choose(changes.keeps_in_eval)
        self.reserved.update(changes.reserved)
        if changes.export is not None:
            self._exports.append(changes.export)
        self._load = changes.load or self._load
        self._files = changes.files or self._files
        if changes.monitor is not None:
            self.monitors.append(changes.monitor)

    def add_frozen_rows(self) -> None:
        """Adds the rows of modules that stay in evaluation mode."""
        for names, why in (
            (self.frozen.built, "frozen, and in evaluation mode when built"),
            (self.frozen.chosen, "frozen by freeze; freeze_mode=train would have them run as in training"),
        ):
            if kept := self.frozen.find(names):
                self.rows.append(make_row("evaluation mode", kept, f" ({why})"))

    def table(self) -> list[str]:
        """Returns the rows as lines; none for a module that was left alone."""
        width = max((len(label) for label, _ in self.rows), default=0)
        return [f"{label.ljust(width)}  {text}" for label, text in self.rows]

    def watch_calls(self) -> None:
        """Begins to record which of the expected modules are called.

        Hooks would be compiled with a graph that hides calls: there only optimizations with a `was_called` are checked.
        """
        if self.is_compiled:
            self._expected = {name: what for name, what in self._expected.items() if what in self._was_called}
            return
        for name in self._expected:
            self._hooks[name] = self.module.get_submodule(name).register_forward_hook(
                lambda *_, name=name: self._called.add(name)
            )

    def check_calls(self, is_last: bool = True) -> list[str]:
        """Checks, after a step, that every expected module was called; returns those that still may be.

        Args:
            is_last: no module is waited for; else one is whose neighbours were called, for it may be skipped at random.
        Raises:
            ValueError: naming the modules that were not called.
        """
        if self.is_compiled:
            self._called |= {name for name, what in self._expected.items() if self._was_called[what](name)}
        hopeless, waiting = split_uncalled(self._expected.keys() - self._called, self._called)
        idle: dict[str, list[str]] = {}
        for name in sorted([*hopeless, *waiting] if is_last else hopeless):
            idle.setdefault(self._expected[name], []).append(name)
        self._expected = {} if idle or is_last else {name: self._expected[name] for name in waiting}
        for name in self._hooks.keys() - self._expected.keys():
            self._hooks.pop(name).remove()
        if idle:
            listed = "; ".join(f"{what}: {shorten(names)}" for what, names in idle.items())
            raise ValueError(
                f"never called so far: {listed}; what uses their weights without calling them is left without the "
                "change; put them in exclude"
            )
        return waiting

    def exported(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a state of the module in the form that is exported."""
        for export in reversed(self._exports):
            state = export(state)
        return dict(state)

    def exported_files(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the files that are written beside an exported state: tensors or JSON values by the file's name."""
        return {} if self._files is None else self._files(state)

    def load_exported(self, state: Mapping[str, Tensor]) -> None:
        """Loads the result of `exported`.

        Raises:
            RuntimeError: names or shapes that are not those of the module.
        """
        if self._load is None:
            load_weights(self.module, state)
        else:
            self._load(state)

    def undo(self) -> None:
        """Restores the module's structure; trained weights keep their values."""
        for hook in self._hooks.values():
            hook.remove()
        self._undo.close()
        self.monitors.clear()
        self._exports.clear()
        self._load = self._files = None
