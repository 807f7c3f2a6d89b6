"""The processes of a run: start-up, ranks, and collectives that are no-ops on one process."""

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
    """A process's number among those of its run, and where they meet."""

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
        """Says whether another process listens at the address."""

    @property
    def store_file(self) -> str:
        """Returns the file in which they meet instead of at the address; or nothing."""


def connect(place: Rendezvous, timeout_s: float) -> dist.Store:
    """Returns the store in which the processes of a run leave messages for each other.

    A `FileStore` has no port, and is as private as its folder. A `TCPStore` listens on all interfaces, whatever its
    address: anyone who reaches its port can read and write it.

    Raises:
        RuntimeError: nobody answers there within the time.
    """
    timeout = timedelta(seconds=timeout_s)
    if place.store_file:
        store = dist.FileStore(place.store_file, -1)  # -1: no process removes the file when it closes the store
        store.set_timeout(timeout)
        return store
    is_host = place.rank == 0 and not place.has_external_store
    return dist.TCPStore(
        place.address, place.port, place.world_size, is_host, timeout=timeout, wait_for_workers=False, multi_tenant=True
    )


def wait_for(store: dist.Store, keys: list[str], timeout_s: float) -> bool:
    """Says whether a store of any kind has all of the keys within the time.

    Unlike `store.wait`, it hears signals meanwhile, and the kinds of stores do not differ in what they raise.
    """
    began = time.monotonic()
    while not (has_all := store.check(keys)) and (waited_s := time.monotonic() - began) < timeout_s:
        # Many ranks that wait for long shall not keep the store busy.
        time.sleep(min(max(waited_s / 100, _POLL_S), _MAX_POLL_S))
    return has_all


_POLL_S, _MAX_POLL_S = 0.01, 0.1


@contextlib.contextmanager
def init_process_group(place: Rendezvous, store: dist.Store | None, backend: str, timeout_s: float) -> Iterator[None]:
    """Makes the ranks one group for the length of a block; with one rank, nothing.

    Args:
        store: of this group alone: a `PrefixStore` where several groups follow each other.
        backend: gloo, nccl (with gloo for what lies on the CPU), or what torch knows else.
        timeout_s: how long a rank waits for the others in a collective before it raises.
    """
    if place.world_size == 1:
        yield
        return
    backends = f"cpu:gloo,cuda:{backend}" if backend == "nccl" else backend
    timeout = timedelta(seconds=timeout_s)
    if store is not None:  # what follows waits for the others without hearing a signal
        store.set(f"here/{place.rank}", "")
        wait_for(store, [f"here/{number}" for number in range(place.world_size)], timeout_s)
    dist.init_process_group(backends, store=store, rank=place.rank, world_size=place.world_size, timeout=timeout)
    global _control_group, _local_rank
    _local_rank = place.local_rank
    _control_group = dist.new_group(
        backend="gloo", timeout=timeout
    )  # what goes through `gather` never meets a gradient
    try:
        yield
    finally:
        _control_group, _local_rank = None, None
        dist.destroy_process_group()


_control_group: dist.ProcessGroup | None = None
_local_rank: int | None = None


def is_distributed() -> bool:
    """Says whether there is more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Returns the number of ranks: 1 where there is no group."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """Returns this process's rank: 0 where there is no group."""
    return dist.get_rank() if is_distributed() else 0


def local_rank() -> int | None:
    """Returns this process's number among the ranks of its machine: None where there is no group."""
    return _local_rank


def count_collectives() -> list[int]:
    """Returns how many collectives of the group of all ranks this one has begun, by kind of device."""
    group: Any = dist.group.WORLD
    backends = [group._get_backend(device) for device in sorted(group._device_types, key=str)]
    return [backend._get_sequence_number_for_group() for backend in backends]


def is_rank_zero() -> bool:
    """Says whether this is the rank that writes what is written once."""
    return rank() == 0


class RankLostError(RuntimeError):
    """Another rank is gone, or does not answer: nothing more can be agreed with it."""


class RankAbortError(RankLostError):
    """This rank goes in the midst of what all do, and has left word of why: its message. The cause is what it was."""

    def __init__(self, message: str, is_told: bool) -> None:
        super().__init__(message)
        self.is_expected = is_told


def is_connection_error(error: BaseException) -> bool:
    """Says whether an error is of ranks that don't reach each other."""
    if isinstance(error, (RankLostError, dist.DistBackendError, dist.DistNetworkError)):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _OF_CONNECTIONS)


_OF_CONNECTIONS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "Timed out waiting")


def all_gather_object(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Returns every rank's value, by rank, on every rank. Values are sent as `message.encode` takes them.

    Raises:
        TypeError, ValueError: this rank's value can't be sent.
        LostError: a rank is gone, or does not answer within the group's time.
        RankError: a rank has sent something else than a message.
    """
    if not is_distributed():
        return [value]
    return _gather_encoded(message.encode(value), group or _control_group)


def _gather_encoded(data: bytes, group: dist.ProcessGroup | None) -> list[Any]:
    fitting = _gather_bytes(len(data).to_bytes(8, "little") + data[:_AT_ONCE], _AT_ONCE + 8, group)
    sizes = [int.from_bytes(part[:8], "little") for part in fitting]
    fits = max(sizes) <= _AT_ONCE
    parts = [part[8:] for part in fitting] if fits else _gather_bytes(data, max(sizes), group)
    return [_decode(number, part[:size]) for number, (part, size) in enumerate(zip(parts, sizes, strict=True))]


def _decode(number: int, data: bytes) -> Any:
    try:
        return message.decode(data)
    except ValueError as error:
        raise RankError(f"rank {number} has sent something else than a message: {error}") from error


_AT_ONCE = 4088  # bytes for which one collective is enough


def _gather_bytes(data: bytes, size: int, group: dist.ProcessGroup | None) -> list[bytes]:
    own = torch.zeros(size, dtype=torch.uint8)
    own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    parts = [torch.empty(size, dtype=torch.uint8) for _ in range(dist.get_world_size(group))]
    try:
        dist.all_gather(parts, own, group=group)
    except RuntimeError as error:
        raise RankLostError(str(error).splitlines()[0]) from error
    return [part.numpy().tobytes() for part in parts]


class RankError(RuntimeError):
    """What failed on one rank, raised on every rank: the message says where and what; its cause, what failed here."""


def run_on_all_ranks(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Returns what `work` gave on every rank, by rank; all ranks call it.

    Raises:
        RankError: it failed on one of them; on one process the error itself.
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
        cause, failure = error, _describe_to_ranks(error)
        data = message.encode((None, failure))
    found = _gather_encoded(data, group or _control_group)
    if cause is not None and all(other == failure for _, other in found):
        raise cause  # of all, and the same
    for number, (_, other) in enumerate(found):
        if other is not None:
            raise RankError(f"rank {number}: {other}") from cause
    return [value for value, _ in found]


def _describe_to_ranks(error: BaseException) -> str:
    """Returns an error's type and message; the message of one of the runner's own types is complete without it."""
    is_own = type(error).__module__.partition(".")[0] == __name__.partition(".")[0]
    return message_of(error) if is_own else describe(error)


def run_on_rank_zero(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Returns on every rank what `work` gave on the leader, which alone calls it.

    Raises:
        RankError: it failed there; on one process the error itself.
    """
    return run_on_all_ranks(lambda: work() if is_rank_zero() else None, group)[0]  # type: ignore[return-value]
