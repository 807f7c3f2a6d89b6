"""The modules of a run's other engines, as a feeder receives them: `feeder(module, batch, engines)`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from runner.engines.forward import Feeder
from runner.engines.gradients import BufferSnapshot
from runner.utils.distributed import is_distributed
from runner.utils.train.failures import SetupError
from runner.utils.utils import suggest

if TYPE_CHECKING:
    from runner.engines.engine import Engine

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class OtherModuleError(SetupError, KeyError, ValueError):
    """A feeder asked for a module that it can't have.

    A KeyError, so that `engines.get(name)` returns None; its message is shown to the user.
    """

    __str__ = Exception.__str__  # that of KeyError adds quotes


class OtherModules(Mapping[str, nn.Module]):
    """The modules of all engines by name, for the feeder of one of them.

    As a context it spans forward and backward of a micro-step. A module that the feeder asks for meanwhile has
    parameters without gradients, while gradients flow through it to the feeder's own module. At the end, its buffers
    are as before: only an engine's own forward changes its statistics. Modules stay in the mode that they have:
    training mode for those that are trained, evaluation mode for teachers.
    """

    def __init__(self) -> None:
        self._name = ""
        self._engines: Mapping[str, Engine] = {}
        self._is_training = False
        self._frozen: dict[str, list[Tensor]] = {}  # parameters to unfreeze at the end, by engine
        self._buffers: dict[str, BufferSnapshot] = {}

    def connect(self, name: str, engines: Mapping[str, Engine]) -> None:
        """Sets the engines, and the name of the one whose feeder this is for."""
        self._name, self._engines = name, engines

    def bind(self, feeder: Feeder) -> Feeder:
        """Returns the feeder called with these modules, as its argument `engines` or its third one."""
        parameter = inspect.signature(_callable_of(feeder)).parameters.get("engines")
        if parameter is not None and parameter.kind is not inspect.Parameter.POSITIONAL_ONLY:
            return partial(feeder, engines=self)

        def feed_with_engines(module: nn.Module, batch: Any) -> Any:
            return feeder(module, batch, self)

        return feed_with_engines

    def __getitem__(self, name: str) -> nn.Module:
        engine = self._engines.get(name)
        if engine is None:
            own = self._engines.get(self._name)
            raise OtherModuleError(
                f"the feeder of {self._name} asks for engine {name!r}: {suggest(str(name), list(self._engines))} "
                "(an export contains one engine: evaluate the run or a checkpoint)",
                is_complete=own is not None and own.steps > 0,
            )
        if self._is_training and name != self._name and name not in self._frozen:
            self._freeze(name, engine)
        return engine.module

    def __iter__(self) -> Iterator[str]:
        return iter(self._engines)

    def __len__(self) -> int:
        return len(self._engines)

    def __enter__(self) -> None:
        self._is_training = True

    def __exit__(self, *error: object) -> None:
        self._is_training = False
        for name, parameters in self._frozen.items():
            for parameter in parameters:
                parameter.requires_grad_(True)
            if self._engines[name].optimizer is not None:
                self._buffers[name].restore()
        self._frozen.clear()

    def _freeze(self, name: str, engine: Engine) -> None:
        if engine.strategy.is_sharded and is_distributed():
            raise OtherModuleError(
                f"the feeder of {self._name} asks for engine {name!r}, whose weights are sharded over the ranks; "
                "choose distributed=ddp",
                is_complete=False,
            )
        self._frozen[name] = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        for parameter in self._frozen[name]:
            parameter.requires_grad_(False)
        if engine.optimizer is None:
            return
        if name in self._buffers:
            self._buffers[name].save()
        else:
            self._buffers[name] = BufferSnapshot(engine.module)


def connect_feeder(feeder: Feeder) -> tuple[OtherModules | None, Feeder]:
    """Returns the modules that a feeder takes, or None, and the feeder as it is called: feeder(module, batch)."""
    if not takes_engines(feeder):
        return None, feeder
    other_modules = OtherModules()
    return other_modules, other_modules.bind(feeder)


def takes_engines(feeder: Feeder) -> bool:
    """Returns whether a feeder has a parameter named `engines`, or three positional ones without a default."""
    try:
        parameters = inspect.signature(_callable_of(feeder)).parameters.values()
    except (TypeError, ValueError):  # of a built-in function
        return False
    required = [p for p in parameters if p.kind in _POSITIONAL and p.default is inspect.Parameter.empty]
    return len(required) > 2 or any(parameter.name == "engines" for parameter in parameters)


def _callable_of(feeder: Feeder) -> Any:
    return feeder.forward if isinstance(feeder, nn.Module) else feeder
