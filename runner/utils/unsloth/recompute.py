"""Any module, recomputed in the backward pass: between forward and backward it keeps only its inputs.

Torch's checkpoint does it; this hands it every tensor of any call by position, and keeps the module what it is for all
others: its names, its repr, its copies and pickles. Imports torch only.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from runner.utils.distributed.memory import place_of
from runner.utils.modules.generators import Unsearched
from runner.utils.unsloth.comparison import is_close, sums_of, tensors_of, tolerance_of
from runner.utils.unsloth.early_stop import IS_KNOWN
from runner.utils.unsloth.flat_call import FlatCall
from runner.utils.unsloth.offload import Offloader
from runner.utils.unsloth.replay import ForwardState, ReplayForwardState

_STATE, _OWN = "_recompute", "_recompute_own_forward"
_NOTHING = contextlib.nullcontext()


class RecomputedBlock(Unsearched):
    """What is known of a wrapped block; it stands in the block's own `__dict__` and is copied with it."""

    def __init__(self, module: nn.Module, name: str, engine: Offloader | None) -> None:
        self.name, self.engine = name, engine
        self.surroundings = ForwardState(module, name)
        self.calls = self.input_bytes = self.spared_bytes = 0
        self.input_places: set[int] = set()  # in memory, likewise
        self.is_counting = True  # what its forward would have kept; in its first step only
        self.is_proven = False  # a recomputation has given the output of its forward
        self.timer = engine.timer() if engine is not None else None
        self.is_here = True
        first = next(module.parameters(), None)
        self._anchor = None if first is None or first.device.type == "cpu" else first
        self._has_warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "engine": None, "timer": None, "is_here": False}  # a pickle has the class's own forward

    def anchored(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns tensors with one of the block's device among them: checkpoint keeps that device's generator."""
        if self._anchor is None or any(tensor.device == self._anchor.device for tensor in tensors):
            return tensors
        return [*tensors, self._anchor]

    def is_captured(self) -> bool:
        """Returns whether a CUDA graph is being captured; the block is then run as it is, with one warning.

        A recomputation restores the state of the CUDA generator, which is impossible during a capture.
        """
        is_on_cuda = self._anchor is not None and self._anchor.device.type == "cuda"
        if not is_on_cuda or not torch.cuda.is_current_stream_capturing():
            return False
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{self.name}: it is captured in a CUDA graph, where it can't be recomputed: the graph keeps its "
                "activations; leave the block out with exclude, or don't capture it",
                stacklevel=2,
            )
        return True

    def count_inputs(self, tensors: Sequence[Tensor]) -> None:
        """Counts what a forward is given and has to keep."""
        for tensor in tensors:
            if tensor.requires_grad and not tensor.is_leaf and (found := place_of(tensor)) is not None:
                self.input_places.add(found[0])
                self.input_bytes += found[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> RecomputedBlock:
        copied = RecomputedBlock.__new__(RecomputedBlock)
        memo[id(self)] = copied
        for key, value in vars(self).items():
            vars(copied)[key] = value if key in ("engine", "timer") else copy.deepcopy(value, memo)
        return copied

    def context(self) -> Any:
        """Returns what a forward runs in."""
        is_watched = self.is_counting or (self.timer is not None and self.timer.is_measuring)
        return _Watched(self) if is_watched else _NOTHING


class _Watched:
    """A forward whose time is taken, or of which is counted what it hands to autograd to keep.

    It is torch's checkpoint that it is handed to, whose hooks are called, and which keeps none of it.
    """

    def __init__(self, block: RecomputedBlock) -> None:
        self._block, self._seen = block, dict[int, StorageWeakRef]()
        self._hooks: Any = None
        self._begun: Any = None

    def __enter__(self) -> None:
        if self._block.timer is not None:
            self._begun = self._block.timer.begin()
        if self._block.is_counting:
            self._count()

    def _count(self) -> None:
        top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
        hooks = top(False) if top is not None else None
        if hooks is None:  # another torch: nothing is counted
            return
        pack, unpack = hooks[:2]

        def count(tensor: Tensor) -> Any:
            found = place_of(tensor)
            if found is not None and not (tensor.is_leaf and tensor.requires_grad):  # a parameter is there anyway
                place, num_bytes = found
                if place not in self._seen or self._seen[place].expired():  # checkpoint frees it: another may lie there
                    self._seen[place] = StorageWeakRef(tensor.untyped_storage())
                    self._block.spared_bytes += num_bytes
            return pack(tensor)

        self._hooks = saved_tensors_hooks(count, unpack)
        self._hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._hooks is not None:
            self._hooks.__exit__(*error)
            self._hooks = None  # it holds this
        if self._block.timer is not None:
            self._block.timer.end(self._begun)


class _Checked:
    """A function whose recomputation is to give the output of its forward; used until one of its block has done so.

    Args:
        module: whose block it is.
    """

    def __init__(self, function: FlatCall, block: RecomputedBlock, module: nn.Module) -> None:
        self._function, self._block = function, block
        self._tensors = (*function.tensors, *module.parameters())
        self._sums: list[Tensor] | None = None
        self._tolerance = 0.0
        self.is_comparable = True

    def __call__(self, *tensors: Tensor) -> Any:
        output = self._function(*tensors)
        if self._sums is None:
            # A block that nothing is differentiated through is never recomputed.
            has_gradient = any(tensor.requires_grad for tensor in tensors_of(output))
            self._sums = sums_of(output) if has_gradient else []
            self._tolerance, self._tensors = tolerance_of([*self._tensors, *tensors_of(output)]), ()
        elif self.is_comparable:
            self._compare(output)
        return output

    def _compare(self, output: Any) -> None:
        for sums, others in zip(self._sums or (), sums_of(output), strict=False):
            if not is_close(sums, others, self._tolerance):
                raise RuntimeError(
                    f"{self._block.name}: recomputing it gave another output than its forward, and its gradients would "
                    "be wrong: it depends on something that is not replayed, such as a random generator out of its "
                    "reach or a count of its calls in a list; keep the generator in an attribute and the count in a "
                    "buffer, or leave the block out with exclude"
                )
        self._block.is_proven = True


def wrap(module: nn.Module, engine: Offloader | None = None, name: str = "block") -> None:
    """Has a module keep only its inputs, and recompute the rest in the backward pass; what is wrapped stays as it is.

    Args:
        engine: moves the inputs away meanwhile; None leaves them where they are.
        name: what a message calls it.
    Raises:
        ValueError: the module is compiled as a whole, or draws random numbers that can't be replayed.
    """
    known = module.__dict__.get(_STATE)
    if known is not None and known.is_here:
        return
    if is_compiled(module):
        raise ValueError(
            f"{name}: it is compiled with its call, and recomputation would stand inside: compile its forward"
        )
    _refuse_cudnn_dropout(module, name)
    own = module.__dict__.get("forward")
    if own is not None:
        module.__dict__[_OWN] = own
    module.__dict__[_STATE] = RecomputedBlock(module, name, engine)
    module.__dict__["forward"] = types.MethodType(_wrapping(type(module).forward if own is None else own), module)


def _refuse_cudnn_dropout(module: nn.Module, name: str) -> None:
    """Checks that no dropout between the layers of an RNN is drawn by cuDNN.

    cuDNN keeps a random state of its own on the device: a recomputation would drop other elements than the forward.
    """
    for key, part in module.named_modules():
        if not isinstance(part, nn.RNNBase) or not part.dropout or part.num_layers == 1:
            continue
        if torch.backends.cudnn.enabled and next(part.parameters()).is_cuda:
            path = f"{name}.{key}" if key else name
            raise ValueError(
                f"{path}: cuDNN draws the dropout of this {type(part).__name__} from a state that can't be replayed, "
                "so recomputing it would give wrong gradients: leave the block out with exclude, set its dropout=0, or "
                "set torch.backends.cudnn.enabled = False"
            )


def unwrap(module: nn.Module) -> None:
    """Makes a wrapped module what it was; another is left alone."""
    if not is_wrapped(module):  # or its user has put another forward over it
        return
    del module.__dict__[_STATE]
    del module.__dict__["forward"]
    if (own := module.__dict__.pop(_OWN, None)) is not None:
        module.__dict__["forward"] = own


def is_wrapped(module: nn.Module) -> bool:
    """Says whether a module is recomputed in the backward pass."""
    return hasattr(getattr(module.__dict__.get("forward"), "__func__", None), _STATE)


def _wrapping(own: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a method with the signature of another.

    One that is a function and bound, so that a copy of its module runs with the copy's weights; and without the other's
    `__dict__`, where torch.compile leaves its marks.
    """

    @functools.wraps(own, updated=())
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _run(self, args, kwargs)

    forward.__name__ = "forward"  # by which a pickle finds the class's own
    setattr(forward, _STATE, True)
    return forward


def _run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    own = module.__dict__.get(_OWN) or types.MethodType(type(module).forward, module)
    block: RecomputedBlock = module.__dict__[_STATE]
    block.calls += 1
    if not torch.is_grad_enabled():
        return own(*args, **kwargs)
    if torch.compiler.is_compiling():
        _refuse_compiler()
    if block.is_captured():
        return own(*args, **kwargs)
    call = FlatCall(own, args, kwargs)
    tensors = block.anchored(call.tensors)
    if block.is_counting:
        block.count_inputs(tensors)
    before, versions = block.surroundings.versions(), [tensor._version for tensor in tensors]
    is_checked = block.is_counting or not block.is_proven
    replay = ReplayForwardState(block.surroundings, call, is_checked)
    function = _Checked(call, block, module) if is_checked else call
    recomputed = functools.partial(
        checkpoint, function, *tensors, use_reentrant=False, context_fn=lambda: (block.context(), replay),
        early_stop=IS_KNOWN and not is_checked,
    )  # fmt: skip
    engine, timer = block.engine, block.timer
    if engine is None or timer is None or not timer.is_worth_it:
        output = recomputed()
    else:  # torch's checkpoint hands the inputs to the outer hooks, and nothing else
        with saved_tensors_hooks(functools.partial(engine.pack, timer=timer), engine.unpack):
            output = recomputed()
    if call.error is not None:
        error, call.error = call.error, None  # the graph holds the call: with its error it would keep all frames alive
        try:
            raise error
        finally:
            del error
    replay.end_forward()
    if before and block.surroundings.look(before) and isinstance(function, _Checked):
        function.is_comparable = False
    if versions != [tensor._version for tensor in tensors]:
        raise RuntimeError(
            f"{block.name}: its forward has modified an input by an inplace operation, and recomputing it needs the "
            "input as it was; have it change a copy (inplace=False), or leave the block out with exclude"
        )
    return output


def _refuse_compiler() -> None:
    from torch._dynamo.comptime import comptime

    def refuse(_: Any) -> None:
        raise RuntimeError(
            "torch.compile was put around a block that is recomputed in the backward pass, which would break its graph "
            "at each block: compile the blocks instead (optimizations.compile.scope=blocks)"
        )

    comptime(refuse)


def is_compiled(module: nn.Module) -> bool:
    """Says whether a module's call, hooks and all, is compiled."""
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


def block_of(module: nn.Module) -> RecomputedBlock:
    """Returns what is known of a wrapped module."""
    block: RecomputedBlock = module.__dict__[_STATE]
    return block
