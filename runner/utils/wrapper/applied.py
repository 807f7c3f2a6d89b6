"""What was done to a module: told, looked for in the first step, exported without it, undone. Imports torch only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from runner.utils.modules.frozen import FrozenModules
from runner.utils.modules.selection import split_idle
from runner.utils.modules.weights import load_weights

if TYPE_CHECKING:  # each is loaded when it is asked for: a run without any starts sooner
    from runner.utils.unsloth import UnslothReport
    from runner.utils.wrapper.lora import Adapted


@dataclass
class AppliedOptimizations:
    """What was done to a module, and the way back.

    Made before anything is done: `frozen` notes which modules are frozen, and in evaluation mode, from the start.
    """

    module: nn.Module
    rows: list[tuple[str, str]] = field(default_factory=list)
    adapted: Adapted | None = None
    recomputed: UnslothReport | None = None
    exports_adapter: bool = False
    is_compiled: bool = False
    _expected: dict[str, str] = field(
        default_factory=dict
    )  # module names that must be called, and by what they came in
    _called: set[str] = field(default_factory=set)
    _hooks: dict[str, Any] = field(default_factory=dict)
    _undo: list[Callable[[], Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.frozen = FrozenModules(self.module)

    def add_row(self, what: str, names: Iterable[str], remark: str = "") -> None:
        """Adds a row to the table: what was done, to which."""
        listed = list(names)
        self.rows.append((what, f"{len(listed)}: {shorten(listed)}{remark}"))

    def add_skipped(self, what: str, skipped: Mapping[str, str]) -> None:
        """Adds what was left out, and why."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in skipped.items():
            by_reason.setdefault(reason, []).append(name)
        self.rows += [(f"{what}, skipped", f"{shorten(names)}: {reason}") for reason, names in by_reason.items()]

    def on_undo(self, undo: Callable[[], Any]) -> None:
        """Adds a step to the way back."""
        self._undo.append(undo)

    def table(self) -> list[str]:
        """Returns what was done, a line each; nothing for a module that was left alone."""
        width = max((len(what) for what, _ in self.rows), default=0)
        return [f"{what.ljust(width)}  {rest}" for what, rest in self.rows]

    def expect_calls(self, what: str, names: Iterable[str]) -> None:
        """Has `check_calls` look for modules that were put in: one that is never called has no effect."""
        self._expected |= dict.fromkeys(names, what)

    def watch_calls(self) -> None:
        """Begins to see which of them are called.

        In a compiled graph that is not seen, and a hook would be compiled with it: there a gradient tells of adapters.
        """
        if self.is_compiled:
            self._expected = {name: what for name, what in self._expected.items() if what == "lora"}
        for name in () if self.is_compiled else self._expected:
            part = self.module.get_submodule(name)
            self._hooks[name] = part.register_forward_hook(lambda *_, name=name: self._called.add(name))

    def check_calls(self, is_last: bool = True) -> list[str]:
        """Checks, after a step, that all that was put in was called by now; returns what was not, and still may be.

        Args:
            is_last: nothing that was not called is waited for; else what others alike were called beside is.
        Raises:
            ValueError: naming what was not.
        """
        self._called |= {name for name in self._expected if self.is_compiled and self._has_gradient(name)}
        hopeless, waiting = split_idle(self._expected.keys() - self._called, self._called)
        wrong: dict[str, list[str]] = {}
        for name in sorted([*hopeless, *waiting] if is_last else hopeless):
            wrong.setdefault(self._expected[name], []).append(name)
        self._expected = {} if wrong or is_last else {name: self._expected[name] for name in waiting}
        for name in self._hooks.keys() - self._expected.keys():
            self._hooks.pop(name).remove()
        if wrong:
            told = "; ".join(f"{what}: {shorten(names)}" for what, names in wrong.items())
            remedy = "what uses their weights without calling them is left without the change; put them in exclude"
            raise ValueError(f"never called so far: {told}; {remedy}")
        return waiting

    def _has_gradient(self, name: str) -> bool:
        return self.module.get_submodule(name).lora_b.grad is not None

    def exported(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a state of the module as it is to be exported: adapters merged in, or alone."""
        if self.adapted is None:
            return dict(state)
        return self._alone(state) if self.exports_adapter else self.adapted.merged(state)

    def _alone(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what of a state is not as it was before training: adapters, and buffers such as statistics."""
        assert self.adapted is not None
        buffers = {name: state[name] for name, _ in self.module.named_buffers() if name in state}
        return {**self.adapted.adapter(state), **buffers}

    def load_exported(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `exported` gave.

        Raises:
            RuntimeError: names or shapes that are not those of the module.
        """
        if self.adapted is None or not self.exports_adapter:
            load_weights(self.module, state)
            return
        expected = set(self._alone(self.module.state_dict()))
        if wrong := sorted(expected ^ set(state)):
            raise RuntimeError(f"the adapter lacks, or has beside what it should: {', '.join(wrong)}")
        load_weights(self.module, state, strict=False)

    def undo(self) -> None:
        """Makes the module what it was, but for what training has made of its weights."""
        for hook in self._hooks.values():
            hook.remove()
        while self._undo:
            self._undo.pop()()
        self.recomputed = self.adapted = None


def shorten(names: Sequence[str], most: int = 3) -> str:
    """Returns some of the names, where there are many the first and the last."""
    return ", ".join(names) if len(names) <= most else f"{', '.join(names[: most - 1])} ... {names[-1]}"
