"""What a new module takes over from the one whose place it takes: tensors, mode, hooks.

Must not import a model library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_Key = tuple[str, str]  # "parameter" or "buffer", and the dotted name
_HOOKS: dict[str, tuple[str, ...]] = {  # each kind, and what else is kept by a hook's number
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_backward_hooks": (),
    "_backward_pre_hooks": (),
    "_state_dict_hooks": (),
    "_state_dict_pre_hooks": (),
    "_load_state_dict_pre_hooks": (),
    "_load_state_dict_post_hooks": (),
}


@dataclass
class ModuleSwap:
    """What a new module has of an old one, and the way back."""

    old: nn.Module
    new: nn.Module
    keys: list[_Key]
    left_out: list[str]  # tensors of the old module that are nowhere in the new one

    def restore(self) -> None:
        """Gives the old module its tensors as they are now, and the mode of the new one."""
        now = _find_tensors(self.new)
        for key in self.keys:
            if key in now:
                _put(self.old, key, now[key])
        _carry_mode(self.new, self.old)


def transfer_state(old: nn.Module, new: nn.Module, where: str, *, is_strict: bool) -> ModuleSwap:
    """Gives a new module an old one's tensors, those that fit by name, kind, shape and class; its mode; its hooks.

    A tensor of the old module that the new one holds already stays where it is. The old module is left as it is.

    Args:
        is_strict: whether either having a tensor that the other has no like of is an error; else the new one keeps what
            it has.
    Raises:
        ValueError: tensors that do not fit, each with its name; a child with hooks that the new module has no like of.
    """
    theirs, own = _find_tensors(old), _find_tensors(new)
    held, known = {id(each) for each in own.values()}, {id(each) for each in theirs.values()}
    keys, problems = [], []
    for key, tensor in own.items():
        before = theirs.get(key)
        if id(tensor) in known:
            continue
        if before is not None and id(before) not in held:
            problem = _compare(tensor, before, is_strict=is_strict)
            if problem is None:
                keys.append(key)
                continue
        else:
            problem = "has no like in the old module" if tensor.is_meta else ""
        if problem:
            problems.append(f"{' '.join(key)} {problem}")
    lost = [key for key, each in theirs.items() if id(each) not in held and key not in keys]
    if is_strict:
        problems += [f"{' '.join(key)} would be lost" for key in lost if key not in own]
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)}; fit it by arguments, or make is a converter")
    for key in keys:
        _put(new, key, theirs[key])
    _carry_mode(old, new)
    _carry_hooks(old, new, where)
    return ModuleSwap(old, new, keys, [name for _, name in lost])


def _compare(new: Tensor, old: Tensor, *, is_strict: bool) -> str | None:
    """Returns None where the old tensor may stand for the new one, else what is wrong, or "" where nothing is."""
    if new.shape != old.shape:
        return f"is {list(new.shape)} and was {list(old.shape)}" if is_strict or new.is_meta else ""
    if is_strict or new.is_meta:
        return None
    if type(new) is not type(old):
        return ""  # such as a quantized tensor, which says the shape and dtype that it stands for
    return None if new.dtype == old.dtype else f"is {new.dtype} and was {old.dtype}: name it otherwise, or cast it"


def _find_tensors(module: nn.Module) -> dict[_Key, Tensor]:
    parameters = module.named_parameters(remove_duplicate=False)
    found: dict[_Key, Tensor] = {("parameter", name): each for name, each in parameters}
    return found | {("buffer", name): each for name, each in module.named_buffers(remove_duplicate=False)}


def _put(module: nn.Module, key: _Key, tensor: Tensor) -> None:
    owner, _, name = key[1].rpartition(".")
    setattr(module.get_submodule(owner), name, tensor)  # and not into its dict: a recurrent module keeps a list of them


def _carry_mode(old: nn.Module, new: nn.Module) -> None:
    before = dict(old.named_modules(remove_duplicate=False))
    shared = {id(each) for each in before.values()}
    for name, each in new.named_modules(remove_duplicate=False):
        if id(each) not in shared:
            each.training = before.get(name, old).training


def _carry_hooks(old: nn.Module, new: nn.Module, where: str) -> None:
    after = dict(new.named_modules(remove_duplicate=False))
    shared = {id(each) for each in after.values()}
    for name, each in old.named_modules(remove_duplicate=False):
        if id(each) in shared:
            continue
        if name in after:
            _carry_hooks_of_one(each, after[name])
        elif any(getattr(each, kind) for kind in _HOOKS):
            raise ValueError(f"{where}: {name} has hooks and the new module has no {name}; remove them first")


def _carry_hooks_of_one(old: nn.Module, new: nn.Module) -> None:
    for kind, sides in _HOOKS.items():
        hooks, own = getattr(old, kind), getattr(new, kind)
        carried = {key: _bind(hook, new) for key, hook in hooks.items() if not _is_of(hook, old)}
        if not carried:
            continue
        if not own and all(carried.get(key) is hook for key, hook in hooks.items()):
            for each in (kind, *sides):
                setattr(new, each, getattr(old, each))  # the very dict: the handle its user has still removes a hook
            continue
        own.update(carried)
        for side in sides:
            getattr(new, side).update({key: flag for key, flag in getattr(old, side).items() if key in carried})
    if new._backward_hooks and new._is_full_backward_hook is None:
        new._is_full_backward_hook = old._is_full_backward_hook


def _is_of(hook: Any, module: nn.Module) -> bool:
    """Says whether a hook is a method of the module, which its own class registered: another class has its own."""
    return getattr(getattr(hook, "hook", hook), "__self__", None) is module


def _bind(hook: Any, module: nn.Module) -> Any:
    """Returns a hook that is called with the module it stands on, where torch keeps that module with the hook."""
    return type(hook)(hook.hook, module) if getattr(hook, "with_module", False) else hook
