"""Frozen modules that stay in eval mode while the rest of a model trains.

In training mode a frozen normalization would keep updating its statistics, and frozen dropout would be active.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


class FrozenModules:
    """The submodules of a module that stay in eval mode because all of their parameters are frozen.

    A submodule without parameters does not count as frozen, nor does one that an adapter has made trainable.

    Attributes:
        built: the submodules that were frozen and in eval mode at construction, by name; each with those of its own
            submodules that were in training mode, which stay in it.
        chosen: the submodules added by `choose`, by name.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.built: dict[str, list[str]] = {}
        for name, part in module.named_modules():
            if name and not part.training and _is_frozen(part):
                self.built[name] = [inner for inner, submodule in part.named_modules() if submodule.training]
        self.chosen: list[str] = []

    def choose(self, names: Iterable[str]) -> None:
        """Adds each submodule whose parameters all are among these names."""
        parameters = dict(self._module.named_parameters(remove_duplicate=False))
        frozen = {id(parameters[name]) for name in names}
        for name, part in self._module.named_modules():
            parameter_ids = {id(parameter) for parameter in part.parameters()}
            if name and parameter_ids and parameter_ids <= frozen:
                self.chosen.append(name)

    def find(self, names: Iterable[str]) -> dict[str, nn.Module]:
        """Returns the outermost submodules of these names that still exist and are frozen."""
        parts = dict(self._module.named_modules(remove_duplicate=False))
        outermost: dict[str, nn.Module] = {}
        for name in names:
            is_within = any(name.startswith(outer + ".") for outer in outermost)
            if not is_within and name in parts and _is_frozen(parts[name]):
                outermost[name] = parts[name]
        return outermost

    def put_into_eval(self) -> None:
        """Sets the frozen submodules to eval mode, after the module was set to training mode."""
        for name, part in self.find(self.built).items():
            part.eval()
            for inner in self.built[name]:
                part.get_submodule(inner).training = True
        for part in self.find(self.chosen).values():
            part.eval()


def _is_frozen(part: nn.Module) -> bool:
    flags = [parameter.requires_grad for parameter in part.parameters()]
    return bool(flags) and not any(flags)
