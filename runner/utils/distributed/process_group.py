"""The process group: start-up, ranks, and collectives that are no-ops on one process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from runner.utils.files import message
from runner.utils.utils import describe, is_signal, message_of

T = TypeVar("T")


class Rendezvous(Protocol):
    """A process's rank, and the address or file at which the ranks rendezvous."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def local_rank(self) -> int: ...

    @property
    def address(self) -> str: ...

    @property
    def port(self) -> int: ...

    @property
    def has_external_store(self) -> bool:
        """True if another process than rank zero hosts the store at the address."""

    @property
    def store_file(self) -> str:
        """The file of a `FileStore`, used in place of the address; empty for none."""


def create_store(rendezvous: Rendezvous, timeout_s: float) -> dist.Store:
    """Returns the store through which the processes of a run find each other and leave messages.

    A `FileStore` has no port, and is as private as its folder. A `TCPStore` listens on all interfaces, whatever its
    address: anyone who reaches its port can read and write it.

    Raises:
        RuntimeError: nobody hosts the store within `timeout_s` seconds.
    """
    timeout = timedelta(seconds=timeout_s)
    if rendezvous.store_file:
        store = dist.FileStore(rendezvous.store_file, -1)  # -1: no process removes the file when it closes the store
        store.set_timeout(timeout)
        return store
    return dist.TCPStore(
        rendezvous.address,
        rendezvous.port,
        rendezvous.world_size,
        is_master=rendezvous.rank == 0 and not rendezvous.has_external_store,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
    )


def wait_for_keys(store: dist.Store, keys: list[str], timeout_s: float) -> bool:
    """Waits until a store has all of the keys; returns whether it has them within `timeout_s` seconds.

    Unlike `store.wait`, it lets signal handlers run meanwhile and behaves alike for every kind of store.
    """
    began = time.monotonic()
    while not (has_all := store.check(keys)) and (waited_s := time.monotonic() - began) < timeout_s:
        # Poll less often the longer it takes: many waiting ranks must not keep the store busy.
        time.sleep(min(max(waited_s / 100, _POLL_S), _MAX_POLL_S))
    return has_all


_POLL_S, _MAX_POLL_S = 0.01, 0.1


@contextlib.contextmanager
def init_process_group(
    rendezvous: Rendezvous, store: dist.Store | None, backend: str, timeout_s: float
) -> Iterator[None]:
    """Initializes the default process group for the length of a block; does nothing for a single rank.

    Args:
        store: a store for this group alone: a `PrefixStore` if several groups follow each other.
        backend: gloo, nccl (with gloo for CPU tensors), or another backend of torch.
        timeout_s: seconds that a rank waits for the others in a collective before it raises.
    """
    if rendezvous.world_size == 1:
        yield
        return
    backends = f"cpu:gloo,cuda:{backend}" if backend == "nccl" else backend
    timeout = timedelta(seconds=timeout_s)
    # Wait for the other ranks here: torch's own wait below does not let signal handlers run.
    _wait_for_ranks(rendezvous, store, "here", timeout_s)
    dist.init_process_group(
        backends, store=store, rank=rendezvous.rank, world_size=rendezvous.world_size, timeout=timeout
    )
    global _control_group, _local_rank
    _local_rank = rendezvous.local_rank
    # A group of its own, so that gathered objects never mix with gradients.
    _control_group = dist.new_group(backend="gloo", timeout=timeout)
    # A rank whose block fails at once closes its connections: the others must have connected by then.
    _wait_for_ranks(rendezvous, store, "connected", timeout_s)
    try:
        yield
    finally:
        _control_group, _local_rank = None, None
        dist.destroy_process_group()


def _wait_for_ranks(rendezvous: Rendezvous, store: dist.Store | None, stage: str, timeout_s: float) -> None:
    if store is not None:
        store.set(f"{stage}/{rendezvous.rank}", "")
        wait_for_keys(store, [f"{stage}/{number}" for number in range(rendezvous.world_size)], timeout_s)


_control_group: dist.ProcessGroup | None = None
_local_rank: int | None = None


def is_distributed() -> bool:
    """Returns whether there is more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Returns the number of ranks; 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """Returns the rank of this process; 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def local_rank() -> int | None:
    """Returns the rank of this process on its machine; None without a process group."""
    return _local_rank


def count_collectives() -> list[int]:
    """Returns the number of collectives that this rank has begun in the default group, by type of device."""
    group: Any = dist.group.WORLD
    backends = [group._get_backend(device) for device in sorted(group._device_types, key=str)]
    return [backend._get_sequence_number_for_group() for backend in backends]


def is_rank_zero() -> bool:
    """Returns whether this is rank zero, the rank that writes shared files."""
    return rank() == 0


class RankLostError(RuntimeError):
    """Another rank is gone or does not answer: no collective with it is possible any more."""


class RankAbortError(RankLostError):
    """This rank aborts in the middle of a collective step; the message is the reason that it left in the store.

    Attributes:
        is_expected: False for a bug in the program, which is reported with its traceback.
    """

    def __init__(self, message: str, is_expected: bool) -> None:
        super().__init__(message)
        self.is_expected = is_expected


def is_connection_error(error: BaseException) -> bool:
    """Returns whether an error comes from a lost connection between ranks."""
    if isinstance(error, (RankLostError, dist.DistBackendError, dist.DistNetworkError)):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _CONNECTION_MESSAGES)


_CONNECTION_MESSAGES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "gloo",
    "Timed out waiting",
)


def all_gather_object(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Returns the values of all ranks, by rank. Unlike torch's function, it sends JSON and no pickle.

    Args:
        value: plain values, as `message.encode` accepts them.
    Raises:
        TypeError, ValueError: this rank's value can't be encoded.
        RankLostError: a rank is gone, or does not answer within the group's timeout.
        RankError: a rank has sent something else than a message.
    """
    if not is_distributed():
        return [value]
    return _gather_encoded(message.encode(value), group or _control_group)


def _gather_encoded(data: bytes, group: dist.ProcessGroup | None) -> list[Any]:
    # The first collective brings the sizes and short messages; only long ones need a second.
    prefix = len(data).to_bytes(8, "little") + data[:_SINGLE_GATHER_BYTES]
    prefixes = _gather_bytes(prefix, 8 + _SINGLE_GATHER_BYTES, group)
    sizes = [int.from_bytes(part[:8], "little") for part in prefixes]
    is_short = max(sizes) <= _SINGLE_GATHER_BYTES
    parts = [part[8:] for part in prefixes] if is_short else _gather_bytes(data, max(sizes), group)
    return [_decode(number, part[:size]) for number, (part, size) in enumerate(zip(parts, sizes, strict=True))]


def _decode(number: int, data: bytes) -> Any:
    try:
        return message.decode(data)
    except ValueError as error:
        raise RankError(f"rank {number} has sent something else than a message: {error}") from error


_SINGLE_GATHER_BYTES = 4088  # the longest message that the first collective brings whole


def _gather_bytes(data: bytes, size: int, group: dist.ProcessGroup | None) -> list[bytes]:
    local = torch.zeros(size, dtype=torch.uint8)
    local[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    parts = [torch.empty(size, dtype=torch.uint8) for _ in range(dist.get_world_size(group))]
    try:
        dist.all_gather(parts, local, group=group)
    except RuntimeError as error:
        raise RankLostError(str(error).splitlines()[0]) from error
    return [part.numpy().tobytes() for part in parts]


def receive_on_rank_zero(data: torch.Tensor, num_bytes: list[int]) -> Iterator[torch.Tensor]:
    """Yields the bytes of all ranks on rank zero, in the order of the ranks; yields nothing on the others.

    Every rank must call it, and rank zero must take all of them.

    Args:
        data: this rank's bytes, uint8 `[bytes]` on the CPU.
        num_bytes: the number of bytes of each rank.
    Raises:
        RankLostError: a rank is gone, or does not answer within the group's timeout.
    """
    try:
        if not is_rank_zero():
            if data.numel():
                dist.send(data, 0, group=_control_group)
            return
        for number, size in enumerate(num_bytes):
            received = torch.empty(size, dtype=torch.uint8) if number else data
            if number and size:
                dist.recv(received, number, group=_control_group)
            yield received
    except RuntimeError as error:
        raise RankLostError(str(error).splitlines()[0]) from error


def broadcast_bytes(data: torch.Tensor) -> torch.Tensor:
    """Returns rank zero's bytes, uint8 `[bytes]` on the CPU, which all ranks pass with the same size.

    Raises:
        RankLostError: a rank is gone, or does not answer within the group's timeout.
    """
    if is_distributed() and data.numel():
        try:
            dist.broadcast(data, 0, group=_control_group)
        except RuntimeError as error:
            raise RankLostError(str(error).splitlines()[0]) from error
    return data


class RankError(RuntimeError):
    """A failure of one rank, raised on every rank with the failed rank's number; the cause is this rank's own error."""


def run_on_all_ranks(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Returns the results of `work` on all ranks, by rank; every rank must call it.

    Raises:
        RankError: `work` failed on a rank. On one process, or if it failed alike on all ranks, the error itself.
    """
    if not is_distributed():
        return [work()]
    cause: BaseException | None = None
    failure: str | None = None
    try:
        data = message.encode((work(), None))
    except BaseException as error:
        if is_signal(error) or isinstance(error, RankLostError):
            raise
        is_own = type(error).__module__.partition(".")[0] == __name__.partition(".")[0]
        # The name of a type of this package says nothing to a user.
        cause, failure = error, message_of(error) if is_own else describe(error)
        data = message.encode((None, failure))
    results = _gather_encoded(data, group or _control_group)
    if cause is not None and all(other == failure for _, other in results):
        raise cause
    for number, (_, other) in enumerate(results):
        if other is not None:
            raise RankError(f"rank {number}: {other}") from cause
    return [value for value, _ in results]


def run_on_rank_zero(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Returns on every rank the result of `work` on rank zero, the only rank that runs it.

    Raises:
        RankError: `work` failed. On one process, the error itself.
    """
    return run_on_all_ranks(lambda: work() if is_rank_zero() else None, group)[0]  # type: ignore[return-value]
