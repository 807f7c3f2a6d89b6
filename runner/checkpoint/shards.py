"""Writes and reads sharded tensors.

Each rank writes its shards to a SafeTensors file; no file is a pickle. The layout: `shards.json` lists the files, and
the dtype and full shape of each tensor. `shard-00000.safetensors` contains the pieces that rank 0 wrote, under the
names of their tensors. Its metadata has the offsets of each piece, in the format of
`torch.distributed.checkpoint.HuggingFaceStorageReader`, which can read the files too. The planners of that package
determine the pieces of each rank; its `save` exchanges whole plans and takes several times as long.

This module does not depend on the meaning of the tensors. Its import takes half a second: import it only for several
ranks, or for files that they wrote.
"""

from __future__ import annotations

import errno
import json
import math
import re
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner

from runner.utils import io
from runner.utils.distributed import is_distributed, run_on_all_ranks
from runner.utils.files import WritebackFile, disk
from runner.utils.serialization import SFT_DTYPES, dtype_name

INDEX = "shards.json"
_FORMAT = 1
_FILE = re.compile(r"shard-\d{5,}\.safetensors", re.ASCII)
_OFFSETS_KEY, _OFFSET_KEY = "DCP_SHARDING_INFO", "saved_offsets"  # torch's names for the offsets of pieces
_DTYPES = {code: dtype for dtype, code in SFT_DTYPES.items()}
_Piece = tuple[str, tuple[int, ...], tuple[int, ...]]  # name of the tensor, offsets in it, shape of the piece
_MAX_HEADER_BYTES = 100_000_000  # the limit that safetensors readers set


def write(tensors: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Writes tensors to an empty folder on a shared disk.

    Every rank of the group must call it. A rank writes its shard of a DTensor. A piece that several ranks hold is
    written by the rank with the least bytes to write. Files are not flushed to disk. After an error, files that were
    begun remain.

    Args:
        tensors: DTensors, or plain tensors that are the same on every rank; the names must be the same on every rank.
        group: its backend must support the CPU. By default all ranks.
    Raises:
        OSError: on every rank, after an error of the disk on one rank: that rank, the file and the error.
        TypeError, ValueError: a tensor can't be stored; with several ranks a `RankError` that contains the message.
    """
    local: dict[_Piece, Tensor] = {}

    def find_pieces() -> tuple[str, list[_Piece]]:
        local.update(_local_pieces(tensors))
        return sha256(json.dumps(_descriptions(tensors), sort_keys=True).encode()).hexdigest(), [*local]

    digests, held = zip(*run_on_all_ranks(find_pieces, group), strict=True)
    if len(set(digests)) > 1:
        raise ValueError("the names, dtypes or shapes of the tensors are not the same on every rank")
    _check_cover(tensors, {piece for pieces in held for piece in pieces})
    pieces_by_rank = _assign_pieces(held, tensors)
    names = {rank: f"shard-{rank:05d}.safetensors" for rank, pieces in enumerate(pieces_by_rank) if pieces}
    rank = dist.get_rank(group) if is_distributed() else 0

    def attempt() -> tuple[int, str, str | None] | None:
        try:
            if rank in names:
                _write_pieces(folder / names[rank], {piece: local[piece] for piece in pieces_by_rank[rank]})
            if rank == 0:
                document = {"format": _FORMAT, "files": [*names.values()], "tensors": _descriptions(tensors)}
                io.write_new_json(document, folder / INDEX, indent=None)
        except OSError as error:
            return os_error_arguments(error, folder / names.get(rank, INDEX))
        return None

    for failed_rank, error_arguments in enumerate(run_on_all_ranks(attempt, group)):
        if error_arguments is not None:
            code, reason, file = error_arguments
            raise OSError(code, f"rank {failed_rank}: {reason}", file)


def read(folder: Path, is_wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """Returns full tensors on the CPU, without a process group.

    The files may be untrusted.

    Args:
        is_wanted: called with a tensor's name; returns whether it is read.
    Raises:
        ValueError: naming the file and its fault: it is missing, broken, or contradicts another.
        OSError: the disk can't be read.
    """
    known, files = _scan(folder)
    tensors = {name: torch.empty(meta.shape, dtype=meta.dtype) for name, meta in known.items() if is_wanted(name)}
    pieces_by_path = defaultdict(list)
    for piece, path in files.items():
        if piece[0] in tensors:
            pieces_by_path[path].append(piece)
    for path, pieces in pieces_by_path.items():
        with safe_open(path, framework="pt") as file:
            for name, start, sizes in pieces:
                region = tuple(slice(begin, begin + size) for begin, size in zip(start, sizes, strict=True))
                tensors[name][region].copy_(file.get_tensor(name))
    return tensors


@torch.no_grad()
def _local_pieces(tensors: Mapping[str, Tensor]) -> dict[_Piece, Tensor]:
    """Returns the pieces of the tensors that this rank holds."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name!r} is a {type(tensor).__qualname__}, expected a tensor")
        if tensor.layout is not torch.strided or tensor.dtype not in SFT_DTYPES:
            raise TypeError(f"{name!r} is {dtype_name(tensor.dtype)} as {tensor.layout}, which SafeTensors can't hold")
        if name.encode() == b"__metadata__":  # a lone surrogate is a ValueError
            raise ValueError(f"{name!r} is a name that SafeTensors use themselves")
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors))
    pieces = {}
    for item in planner.create_local_plan().items:
        assert item.tensor_data is not None
        chunk, local = item.tensor_data.chunk, cast(Tensor, planner.resolve_data(item)).detach()
        # `DTensor.from_local` of an uneven shard, without the full shape, makes such a tensor.
        if local.shape != chunk.sizes:
            raise ValueError(f"{item.index.fqn!r} has a part {[*local.shape]}, its placement says {[*chunk.sizes]}")
        if local.numel():
            pieces[item.index.fqn, tuple(chunk.offsets), tuple(chunk.sizes)] = local
    return pieces


def _assign_pieces(held: Sequence[Sequence[_Piece]], tensors: Mapping[str, Tensor]) -> list[list[_Piece]]:
    """Returns the pieces that each rank writes.

    Of those that hold a piece, the rank with the least bytes writes it.

    Args:
        held: the pieces that each rank holds.
    """
    holders = defaultdict(list)
    for rank, pieces in enumerate(held):
        for piece in pieces:
            holders[piece].append(rank)
    bytes_of = {piece: math.prod(piece[2]) * tensors[piece[0]].dtype.itemsize for piece in holders}
    assigned_bytes = [0] * len(held)
    assigned = [list[_Piece]() for _ in held]
    # Pieces with a single holder first, then large ones: the rest can even out the ranks.
    for piece in sorted(holders, key=lambda piece: (len(holders[piece]), -bytes_of[piece])):
        rank = min(holders[piece], key=assigned_bytes.__getitem__)
        assigned_bytes[rank] += bytes_of[piece]
        assigned[rank].append(piece)
    return assigned


def _descriptions(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: {"dtype": SFT_DTYPES[tensor.dtype], "shape": [*tensor.shape]} for name, tensor in tensors.items()}


def os_error_arguments(error: OSError, default_file: Path | None = None) -> tuple[int, str, str | None]:
    """Returns the arguments of an equal `OSError`: number, reason and file.

    Other ranks raise it.
    """
    file = error.filename or default_file
    return error.errno or errno.EIO, error.strerror or str(error), None if file is None else str(file)


def _write_pieces(path: Path, pieces: Mapping[_Piece, Tensor]) -> None:
    """Writes a SafeTensors file.

    Pieces on a device are copied to the host one at a time.
    """
    ordered = sorted(pieces.items(), key=lambda pair: -pair[1].dtype.itemsize)  # keeps every tensor aligned
    starts = {name: {_OFFSET_KEY: [*start]} for name, start, _ in pieces}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "DCP_VERSION": "1.0", _OFFSETS_KEY: json.dumps(starts)}}
    end = 0
    for (name, _, sizes), tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": SFT_DTYPES[tensor.dtype], "shape": [*sizes], "data_offsets": [begin, end]}
    encoded = json.dumps(header, ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > _MAX_HEADER_BYTES:
        raise ValueError(f"{path}: its header is {len(encoded):,} bytes, readers take {_MAX_HEADER_BYTES:,}")
    with disk.create(path, "xb") as file:
        stream = cast(BinaryIO, WritebackFile(file))
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for _, tensor in ordered:
            flat = tensor.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
            stream.write(flat.view(torch.uint8).numpy().data)


def _scan(folder: Path) -> tuple[dict[str, Tensor], dict[_Piece, Path]]:
    """Checks the files in a folder.

    Returns meta tensors by name, and the file of each piece.
    """
    index = folder / INDEX
    with _naming_file(index):
        document = io.read_json(index)
        if type(document) is not dict or document.get("format") != _FORMAT:
            raise ValueError(f"is not of format {_FORMAT}")
        known = {name: _meta_tensor(name, entry) for name, entry in document["tensors"].items()}
        for name in document["files"]:
            if type(name) is not str or not _FILE.fullmatch(name):
                raise ValueError(f"lists {name!r}, which is no file of it")
    files: dict[_Piece, Path] = {}
    for name in document["files"]:
        with _naming_file(folder / name):
            for piece in _pieces_in(folder / name, known):
                if piece in files:
                    raise ValueError(f"has a piece of {piece[0]!r} that {files[piece].name} has too")
                files[piece] = folder / name
    with _naming_file(index):
        _check_cover(known, files)
    return known, files


@contextmanager
def _naming_file(path: Path) -> Iterator[None]:
    """Checks that a file exists.

    An error in the context is raised as a ValueError that names the file.
    """
    try:
        if path.is_symlink() or not path.is_file():
            raise ValueError("is missing")
        yield
    except OSError:
        raise
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:
        raise ValueError(f"{path}: is not as it was written, {type(error).__name__}: {error}") from error


def _is_sizes(value: Any) -> bool:
    return type(value) is list and all(type(number) is int and 0 <= number < 1 << 63 for number in value)


def _meta_tensor(name: str, entry: Any) -> Tensor:
    """Returns a meta tensor of the described dtype and shape.

    Raises an error for an impossible shape.
    """
    if not _is_sizes(entry["shape"]):
        raise ValueError(f"{name!r} has the shape {entry['shape']!r}")
    return torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="meta")


def _pieces_in(path: Path, known: Mapping[str, Tensor]) -> Iterator[_Piece]:
    """Yields the pieces that a file contains; checks that each is within its tensor."""
    with safe_open(path, framework="pt") as file:
        starts = json.loads((file.metadata() or {}).get(_OFFSETS_KEY, "{}"))
        for name in file.keys():  # noqa: SIM118
            if name not in known:
                raise ValueError(f"holds {name!r}, which {INDEX} does not name")
            piece, full, code = file.get_slice(name), known[name].shape, SFT_DTYPES[known[name].dtype]
            start, sizes = starts[name][_OFFSET_KEY], piece.get_shape()
            if piece.get_dtype() != code:
                raise ValueError(f"holds {name!r} as {piece.get_dtype()}, {INDEX} says {code}")
            if not _is_sizes(start) or not len(start) == len(sizes) == len(full):
                raise ValueError(f"has a piece of {name!r} of shape {sizes} that begins at {start!r} of {[*full]}")
            if not math.prod(sizes) or any(a + n > size for a, n, size in zip(start, sizes, full, strict=True)):
                raise ValueError(f"has a piece of {name!r}, {sizes} from {start}, that is not within {[*full]}")
            yield name, tuple(start), tuple(sizes)


def _check_cover(tensors: Mapping[str, Tensor], pieces: Iterable[_Piece]) -> None:
    """Checks that the pieces of each tensor form a grid that covers it.

    Raises:
        ValueError: naming a tensor, and the part that is missing or covered twice.
    """
    cells_by_name = defaultdict(list)
    for name, start, sizes in pieces:
        cells_by_name[name].append((start, sizes))
    for name, tensor in tensors.items():
        cells = cells_by_name[name]
        num_cells = 1 if tensor.numel() else 0
        for dim, length in enumerate(tensor.shape) if num_cells else ():
            cuts = sorted({(start[dim], sizes[dim]) for start, sizes in cells})
            ends = [0, *(start + size for start, size in cuts)]
            if [start for start, _ in cuts] != ends[:-1] or ends[-1] != length:
                found = ", ".join(f"{start}-{start + size}" for start, size in cuts[:5]) or "nothing"
                raise ValueError(f"the pieces of {name!r} have {found} of its 0-{length} in dimension {dim}")
            num_cells *= len(cuts)
        if len(cells) != num_cells:
            raise ValueError(f"{name!r} has {len(cells)} pieces of {num_cells}")
