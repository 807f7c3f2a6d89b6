"""Frozen modules that stay in evaluation mode while the rest of a module trains. Imports torch only.

In training mode the statistics of a frozen normalization would go on changing, and its dropout would drop.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


class FrozenModules:
    """The submodules of a module whose parameters are all frozen, and that stay in evaluation mode.

    A submodule without parameters of its own is not frozen. One that an adapter makes trainable is not any more.

    Attributes:
        built: those that were frozen and in evaluation mode when this was made; each with what stood in it in training
            mode, which stays in that.
        chosen: those that `choose` has taken in.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.built = {
            name: [inner for inner, each in part.named_modules() if each.training]
            for name, part in module.named_modules()
            if name and not part.training and _is_frozen(part)
        }
        self.chosen: list[str] = []

    def choose(self, names: Iterable[str]) -> None:
        """Takes in the submodules all of whose parameters have these names."""
        parameters = dict(self._module.named_parameters(remove_duplicate=False))
        frozen = {id(parameters[name]) for name in names}
        for name, part in self._module.named_modules():
            own = {id(parameter) for parameter in part.parameters()}
            if name and own and own <= frozen:
                self.chosen.append(name)

    def find(self, names: Iterable[str]) -> dict[str, nn.Module]:
        """Returns the outermost submodules of those names that are there, and wholly frozen, still."""
        parts = dict(self._module.named_modules(remove_duplicate=False))
        found: dict[str, nn.Module] = {}
        for name in names:
            is_within = any(name.startswith(outer + ".") for outer in found)
            if not is_within and name in parts and _is_frozen(parts[name]):
                found[name] = parts[name]
        return found

    def put_into_eval(self) -> None:
        """Puts them into evaluation mode, after the module was put into training mode."""
        for name, part in self.find(self.built).items():
            part.eval()
            for inner in self.built[name]:
                part.get_submodule(inner).training = True
        for part in self.find(self.chosen).values():
            part.eval()


def _is_frozen(part: nn.Module) -> bool:
    flags = [parameter.requires_grad for parameter in part.parameters()]
    return bool(flags) and not any(flags)
