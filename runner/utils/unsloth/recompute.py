"""Recomputes a module in the backward pass.

Between forward and backward it keeps only its inputs. Torch's checkpoint does the recomputation. This module passes it
every tensor of any call by position, and leaves the module unchanged for all other code: its names, its repr, its
copies and pickles.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from runner.utils.distributed.memory import memory_range
from runner.utils.modules.generators import Unsearched
from runner.utils.unsloth.comparison import is_close, sums_of, tensors_of, tolerance_of
from runner.utils.unsloth.early_stop import IS_KNOWN, current_hooks
from runner.utils.unsloth.flat_call import FlatCall
from runner.utils.unsloth.offload import Offloader
from runner.utils.unsloth.replay import ForwardState, ReplayForwardState

# Keys in the `__dict__` of a wrapped module; the second is present if the module had a `forward` there.
_BLOCK_KEY, _ORIGINAL_FORWARD_KEY = "_recompute", "_recompute_own_forward"
_NULL_CONTEXT = contextlib.nullcontext()


class RecomputedBlock(Unsearched):
    """State of a wrapped block, stored in its own `__dict__` and copied with it.

    Attributes:
        forward_state: the state that the block's forward depends on; it is restored for a recomputation.
        calls: number of forwards.
        input_bytes: bytes of inputs that the block keeps for backward, in its first step.
        input_addresses: memory addresses of these inputs.
        spared_bytes: bytes of activations that autograd would have kept, in the first step.
        is_counting: true during the first step, in which bytes are counted.
        is_verified: true once a recomputation has returned the same output as its forward.
        timer: decides whether the inputs are offloaded; None without an offloader.
        is_active: false in a block that was loaded from a pickle, whose forward is that of its class.
    """

    def __init__(self, module: nn.Module, name: str, offloader: Offloader | None) -> None:
        self.name, self.offloader = name, offloader
        self.forward_state = ForwardState(module, name)
        self.calls = self.input_bytes = self.spared_bytes = 0
        self.input_addresses: set[int] = set()
        self.is_counting = True
        self.is_verified = False
        self.timer = offloader.timer() if offloader is not None else None
        self.is_active = True
        first = next(module.parameters(), None)
        self._anchor = None if first is None or first.device.type == "cpu" else first
        self._has_warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "offloader": None, "timer": None, "is_active": False}

    def anchored(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Adds a tensor of the block's device if there is none.

        Checkpoint then saves the RNG state of that device.
        """
        if self._anchor is None or any(tensor.device == self._anchor.device for tensor in tensors):
            return tensors
        return [*tensors, self._anchor]

    def is_captured(self) -> bool:
        """Returns whether a CUDA graph is being captured.

        The block is then run as it is, with one warning. A recomputation restores the state of the CUDA generator,
        which is impossible during a capture.
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
        for tensor in tensors:
            if tensor.requires_grad and not tensor.is_leaf and (found := memory_range(tensor)) is not None:
                self.input_addresses.add(found[0])
                self.input_bytes += found[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> RecomputedBlock:
        copied = RecomputedBlock.__new__(RecomputedBlock)
        memo[id(self)] = copied
        for key, value in vars(self).items():
            vars(copied)[key] = value if key in ("offloader", "timer") else copy.deepcopy(value, memo)
        return copied

    def context(self) -> contextlib.AbstractContextManager[None]:
        is_observed = self.is_counting or (self.timer is not None and self.timer.is_measuring)
        return self._observe() if is_observed else _NULL_CONTEXT

    @contextlib.contextmanager
    def _observe(self) -> Iterator[None]:
        """Times a forward and counts the bytes that checkpointing saves.

        In a checkpointed forward, autograd passes each tensor to the hooks of torch's checkpoint, which keep none. A
        counting hook is put in front of these.
        """
        started = None if self.timer is None else self.timer.start()
        hooks = current_hooks() if self.is_counting else None
        try:
            with _NULL_CONTEXT if hooks is None else saved_tensors_hooks(self._counting(hooks[0]), hooks[1]):
                yield
        finally:
            if self.timer is not None:
                self.timer.stop(started)

    def _counting(self, pack: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        """Returns a pack hook that also adds the bytes of each tensor's memory to `spared_bytes`, once."""
        storages = dict[int, StorageWeakRef]()  # by address

        def count(tensor: Tensor) -> Any:
            found = memory_range(tensor)
            if found is not None and not (tensor.is_leaf and tensor.requires_grad):  # a parameter is kept anyway
                address, num_bytes = found
                # Checkpoint frees the storage, so another may be at its address.
                if address not in storages or storages[address].expired():
                    storages[address] = StorageWeakRef(tensor.untyped_storage())
                    self.spared_bytes += num_bytes
            return pack(tensor)

        return count


class _VerifiedCall:
    """A call whose recomputation must return the same output as its forward.

    Used until one recomputation of the block is verified.

    Args:
        module: the block's module.
    """

    def __init__(self, call: FlatCall, block: RecomputedBlock, module: nn.Module) -> None:
        self._call, self._block = call, block
        self._tensors = (*call.tensors, *module.parameters())
        self._sums: list[Tensor] | None = None  # of the output of the forward
        self._tolerance = 0.0
        self.is_comparable = True

    def __call__(self, *tensors: Tensor) -> Any:
        output = self._call(*tensors)
        if self._sums is None:
            # A block without gradients is never recomputed.
            has_gradient = any(tensor.requires_grad for tensor in tensors_of(output))
            self._sums = sums_of(output) if has_gradient else []
            self._tolerance, self._tensors = tolerance_of([*self._tensors, *tensors_of(output)]), ()
        elif self.is_comparable:
            self._compare(output)
        return output

    def _compare(self, output: Any) -> None:
        for forward_sums, sums in zip(self._sums or (), sums_of(output), strict=False):
            if not is_close(forward_sums, sums, self._tolerance):
                raise RuntimeError(
                    f"{self._block.name}: recomputing it gave another output than its forward, and its gradients would "
                    "be wrong: it depends on something that is not replayed, such as a random generator out of its "
                    "reach or a count of its calls in a list; keep the generator in an attribute and the count in a "
                    "buffer, or leave the block out with exclude"
                )
        self._block.is_verified = True


def wrap(module: nn.Module, offloader: Offloader | None = None, name: str = "block") -> None:
    """Wraps a module so that it keeps only its inputs and is recomputed in backward.

    A module that is wrapped already stays as it is.

    Args:
        offloader: moves the inputs to the host between forward and backward; None keeps them on the device.
        name: used in messages.
    Raises:
        ValueError: the module is compiled as a whole, or draws random numbers that can't be replayed.
    """
    block = module.__dict__.get(_BLOCK_KEY)
    if block is not None and block.is_active:
        return
    if is_compiled(module):
        raise ValueError(
            f"{name}: it is compiled with its call, and recomputation would stand inside: compile its forward"
        )
    _refuse_cudnn_dropout(module, name)
    if (original := module.__dict__.get("forward")) is not None:
        module.__dict__[_ORIGINAL_FORWARD_KEY] = original
    module.__dict__[_BLOCK_KEY] = RecomputedBlock(module, name, offloader)
    forward = _make_forward(type(module).forward if original is None else original)
    module.__dict__["forward"] = types.MethodType(forward, module)


def _refuse_cudnn_dropout(module: nn.Module, name: str) -> None:
    """Checks that cuDNN does not draw the dropout between the layers of an RNN.

    cuDNN keeps its own random state on the device: a recomputation would drop other elements than the forward.
    """
    for key, part in module.named_modules():
        has_dropout = isinstance(part, nn.RNNBase) and part.dropout and part.num_layers > 1
        if has_dropout and torch.backends.cudnn.enabled and next(part.parameters()).is_cuda:
            path = f"{name}.{key}" if key else name
            raise ValueError(
                f"{path}: cuDNN draws the dropout of this {type(part).__name__} from a state that can't be replayed, "
                "so recomputing it would give wrong gradients: leave the block out with exclude, set its dropout=0, or "
                "set torch.backends.cudnn.enabled = False"
            )


def unwrap(module: nn.Module) -> None:
    """Removes the wrapper of a module.

    Does nothing if there is none, or if another `forward` was set over it.
    """
    if not is_wrapped(module):
        return
    del module.__dict__[_BLOCK_KEY]
    del module.__dict__["forward"]
    if (original := module.__dict__.pop(_ORIGINAL_FORWARD_KEY, None)) is not None:
        module.__dict__["forward"] = original


def is_wrapped(module: nn.Module) -> bool:
    """Returns whether a module is recomputed in the backward pass."""
    return hasattr(getattr(module.__dict__.get("forward"), "__func__", None), _BLOCK_KEY)


def _make_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a method that recomputes the original in backward.

    It is a function to be bound to the module, so that a copy of the module runs with the copy's weights. It does not
    copy the original's `__dict__`, where torch.compile stores its marks.
    """

    @functools.wraps(original, updated=())
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _recomputed_forward(self, args, kwargs)

    forward.__name__ = "forward"  # a pickle refers to the method of the class by this name
    setattr(forward, _BLOCK_KEY, True)
    return forward


def _recomputed_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    original = module.__dict__.get(_ORIGINAL_FORWARD_KEY) or types.MethodType(type(module).forward, module)
    block: RecomputedBlock = module.__dict__[_BLOCK_KEY]
    block.calls += 1
    if not torch.is_grad_enabled():
        return original(*args, **kwargs)
    if torch.compiler.is_compiling():
        _refuse_compiler()
    if block.is_captured():
        return original(*args, **kwargs)
    call = FlatCall(original, args, kwargs)
    tensors = block.anchored(call.tensors)
    if block.is_counting:
        block.count_inputs(tensors)
    buffer_versions = block.forward_state.buffer_versions()
    input_versions = [tensor._version for tensor in tensors]
    is_verifying = block.is_counting or not block.is_verified
    replay = ReplayForwardState(block.forward_state, call, is_verifying)
    function = _VerifiedCall(call, block, module) if is_verifying else call
    run_checkpoint = functools.partial(
        checkpoint, function, *tensors, use_reentrant=False, context_fn=lambda: (block.context(), replay),
        early_stop=IS_KNOWN and not is_verifying,
    )  # fmt: skip
    offloader, timer = block.offloader, block.timer
    if offloader is None or timer is None or not timer.is_worth_it:
        output = run_checkpoint()
    else:  # torch's checkpoint passes its inputs, and no other tensor, to hooks outside of it
        with saved_tensors_hooks(functools.partial(offloader.pack, timer=timer), offloader.unpack):
            output = run_checkpoint()
    if call.error is not None:
        # The graph holds the call: an error kept in it would keep all frames of its traceback alive.
        error, call.error = call.error, None
        try:
            raise error
        finally:
            del error
    replay.end_forward()
    is_changed = buffer_versions and block.forward_state.find_changed_buffers(buffer_versions)
    if is_changed and isinstance(function, _VerifiedCall):
        function.is_comparable = False
    if input_versions != [tensor._version for tensor in tensors]:
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
    """Returns whether a module's `__call__`, with its hooks, is compiled."""
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


def block_of(module: nn.Module) -> RecomputedBlock:
    """Returns the state of a wrapped module."""
    return module.__dict__[_BLOCK_KEY]
