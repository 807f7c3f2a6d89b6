"""Transfer of tensors, mode and hooks from a module to the one that replaces it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

Key = tuple[str, str]  # "parameter" or "buffer", and the dotted name
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


def transfer_back(old: nn.Module, new: nn.Module, keys: Iterable[Key]) -> None:
    """Gives the old module the present tensors of these keys and the mode of the new one."""
    now = _find_tensors(new)
    for key in keys:
        if key in now:
            _put(old, key, now[key])
    _carry_mode(new, old)


def transfer_state(old: nn.Module, new: nn.Module, where: str, *, is_strict: bool) -> tuple[list[Key], list[str]]:
    """Gives a new module the tensors of an old one that match by name, kind, shape and class, its mode and its hooks.

    A tensor that the new module shares already stays where it is. The old module is not changed.

    Args:
        is_strict: a tensor without a match in the other module is an error; else the new module keeps its own.
    Returns:
        The keys of the tensors that the new module has got, for `transfer_back`, and the names of tensors of the old
        module that the new one lacks.
    Raises:
        ValueError: tensors that do not match, by name; a child with hooks that the new module lacks.
    """
    old_tensors = _find_tensors(old)
    new_tensors = _find_tensors(new)
    ids_in_new = {id(tensor) for tensor in new_tensors.values()}
    ids_in_old = {id(tensor) for tensor in old_tensors.values()}
    unused = {key: tensor for key, tensor in old_tensors.items() if id(tensor) not in ids_in_new}
    keys, problems = [], []
    for key, tensor in new_tensors.items():
        if id(tensor) in ids_in_old:
            continue
        problem = _compare(tensor, unused.get(key), is_strict=is_strict)
        if problem is None:
            keys.append(key)
        elif problem:
            problems.append(f"{' '.join(key)} {problem}")
    lost = [key for key in unused if key not in keys]
    if is_strict:
        problems += [f"{' '.join(key)} would be lost" for key in lost if key not in new_tensors]
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)}; fit it by arguments, or make is a converter")
    for key in keys:
        _put(new, key, old_tensors[key])
    _carry_mode(old, new)
    _carry_hooks(old, new, where)
    return keys, [name for _, name in lost]


def _compare(new: Tensor, old: Tensor | None, *, is_strict: bool) -> str | None:
    """Returns None where the old tensor replaces the new one, "" where the new one stays, else the mistake."""
    if old is None:
        return "has no like in the old module" if new.is_meta else ""
    if new.shape != old.shape:
        return f"is {list(new.shape)} and was {list(old.shape)}" if is_strict or new.is_meta else ""
    if is_strict or new.is_meta:
        return None
    if type(new) is not type(old):
        return ""  # as of a quantized tensor, which reports the shape and dtype of the original
    return None if new.dtype == old.dtype else f"is {new.dtype} and was {old.dtype}: name it otherwise, or cast it"


def _find_tensors(module: nn.Module) -> dict[Key, Tensor]:
    tensors: dict[Key, Tensor] = {
        ("parameter", name): each for name, each in module.named_parameters(remove_duplicate=False)
    }
    return tensors | {("buffer", name): each for name, each in module.named_buffers(remove_duplicate=False)}


def _put(module: nn.Module, key: Key, tensor: Tensor) -> None:
    owner, _, name = key[1].rpartition(".")
    # By setattr, and not in the dict of tensors: a recurrent module keeps a list of them beside it.
    setattr(module.get_submodule(owner), name, tensor)


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
                setattr(new, each, getattr(old, each))  # the same dict: the user's handle still removes a hook
            continue
        own.update(carried)
        for side in sides:
            getattr(new, side).update({key: flag for key, flag in getattr(old, side).items() if key in carried})
    if new._backward_hooks and new._is_full_backward_hook is None:
        new._is_full_backward_hook = old._is_full_backward_hook


def _is_of(hook: Any, module: nn.Module) -> bool:
    """Returns True if a hook is a method of the module, which its class registers: another class has its own."""
    return getattr(getattr(hook, "hook", hook), "__self__", None) is module


def _bind(hook: Any, module: nn.Module) -> Any:
    """Returns a hook that is called with the new module, where torch keeps the module with the hook."""
    return type(hook)(hook.hook, module) if getattr(hook, "with_module", False) else hook
