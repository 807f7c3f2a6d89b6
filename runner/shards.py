"""Tensors of many ranks, each rank writing its own share of them as SafeTensors; nothing on disk is a pickle.

Owns the layout. `shards.json` has each tensor's dtype and whole shape and lists the files. `shard-00000.safetensors`
has what rank 0 wrote: pieces under their tensors' names and, in its metadata, where each piece begins, in the words of
`torch.distributed.checkpoint.HuggingFaceStorageReader`, which reads them too. Who writes and reads what is decided by
the planners of torch.distributed.checkpoint. Must not know what the tensors are of. Importing it takes half a second:
it is for those who have several ranks, or files of them.
"""

from __future__ import annotations

import errno
import json
import math
import re
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, SavePlan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItem

from runner.utils import io
from runner.utils.distributed import is_many, together
from runner.utils.files import EagerFile
from runner.utils.packing import SFT_DTYPES, name_of

INDEX = "shards.json"
_FORMAT = 1
_FILE = re.compile(r"shard-\d{5,}\.safetensors", re.ASCII)
_STARTS, _START = "DCP_SHARDING_INFO", "saved_offsets"  # torch's names for where a piece begins
_DTYPES = {code: dtype for dtype, code in SFT_DTYPES.items()}
_Known = dict[str, TensorStorageMetadata]
_Places = dict[MetadataIndex, Path]
_MAX_HEADER_BYTES = 100_000_000  # the limit that safetensors readers set


def write(tensors: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Writes tensors to an empty folder on a disk that the ranks share; every rank of the group calls it.

    A rank writes its local part of a DTensor; what is the same on several ranks is written by the one that has least to
    write. Nothing is flushed to disk. What was begun stays behind an error.

    Args:
        tensors: DTensors, or plain tensors that are the same on every rank, under the same names on every rank.
        group: in which word is passed; its backend has to know the CPU. By default all ranks.
    Raises:
        OSError: on every rank, when the disk refused on one: which rank, which file, and what the disk said.
        TypeError, ValueError: something in it can't be stored; of several ranks a `RankError` that says so.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    plans, metadata = planner.create_global_plan(together(lambda: _plan(planner, tensors), group))
    known = cast(_Known, metadata.state_dict_metadata)
    for name, about in known.items():
        _check_cover(name, about)
    shares = [[item for item in plan.items if math.prod(_piece_of(item).sizes)] for plan in plans]
    names = {number: f"shard-{number:05d}.safetensors" for number, share in enumerate(shares) if share}
    number = dist.get_rank(group) if is_many() else 0

    def write_share() -> None:
        if number in names:
            _write_pieces(folder / names[number], shares[number], planner)
        if number == 0:
            described = {name: _described(about) for name, about in known.items()}
            document = {"format": _FORMAT, "files": [*names.values()], "tensors": described}
            io.write_json(document, folder / INDEX, indent=None)

    refused = together(lambda: _refusal_of(write_share, folder / names.get(number, INDEX)), group)
    for rank, error in enumerate(refused):
        if error is not None:
            raise OSError(error.errno, f"rank {rank}: {error.strerror}", error.filename)


def read(folder: Path) -> dict[str, Tensor]:
    """Returns every tensor whole, on the CPU; it needs no process group. The files may be a stranger's.

    Raises:
        ValueError: naming the file and its fault: it is missing, broken, or contradicts another.
        OSError: the disk can't be read.
    """
    known, places = _scan(folder)
    tensors = {name: torch.empty(about.size, dtype=about.properties.dtype) for name, about in known.items()}
    _fill(tensors, known, places)
    return tensors


def read_into(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Fills tensors in place, of a DTensor this rank's part; of the files it reads the pieces that this takes.

    It passes no word between ranks, of which there may be any number, and leaves alone what `targets` doesn't name.

    Raises:
        ValueError: as `read`, or a target is not there with that shape and dtype.
        OSError: the disk can't be read.
    """
    known, places = _scan(folder)
    for name, target in targets.items():
        about = known.get(name)
        found = "not there" if about is None else _text_of(about.properties.dtype, about.size)
        if found != _text_of(target.dtype, target.shape):
            raise ValueError(f"{folder / INDEX}: {name!r} is {found}, not {_text_of(target.dtype, target.shape)}")
    _fill(targets, known, places)


def _plan(planner: DefaultSavePlanner, tensors: Mapping[str, Tensor]) -> SavePlan:
    """Returns what this rank could write."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name!r} is a {type(tensor).__qualname__}, expected a tensor")
        if tensor.layout is not torch.strided or tensor.dtype not in SFT_DTYPES:
            raise TypeError(f"{name!r} is {name_of(tensor.dtype)} as {tensor.layout}, which SafeTensors can't hold")
        if name.encode() == b"__metadata__":  # a lone surrogate is a ValueError
            raise ValueError(f"{name!r} is a name that SafeTensors use themselves")
    planner.set_up_planner(dict(tensors))
    plan = planner.create_local_plan()
    for item in plan.items:
        found, expected = cast(Tensor, planner.resolve_data(item)).shape, _piece_of(item).sizes
        if found != expected:  # such as DTensor.from_local makes of an uneven part when it isn't told the whole shape
            raise ValueError(f"{item.index.fqn!r} has a local part {[*found]} where its placement says {[*expected]}")
    return plan


def _piece_of(item: WriteItem) -> ChunkStorageMetadata:
    assert item.tensor_data is not None
    return item.tensor_data.chunk


def _described(about: TensorStorageMetadata) -> dict[str, Any]:
    return {"dtype": SFT_DTYPES[about.properties.dtype], "shape": [*about.size]}


def _text_of(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{name_of(dtype)}{[*shape]}"


def _refusal_of(work: Callable[[], None], path: Path) -> OSError | None:
    """Returns what the disk had against it, in a form that goes to other ranks."""
    try:
        work()
    except OSError as error:
        return OSError(error.errno or errno.EIO, error.strerror or str(error), str(error.filename or path))
    return None


def _write_pieces(path: Path, items: Sequence[WriteItem], planner: DefaultSavePlanner) -> None:
    """Writes a SafeTensors file, holding one piece at a time in memory."""
    dtypes = {item.index: item.tensor_data.properties.dtype for item in items if item.tensor_data}
    items = sorted(items, key=lambda item: -dtypes[item.index].itemsize)  # keeps every tensor aligned
    starts = {item.index.fqn: {_START: [*_piece_of(item).offsets]} for item in items}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "DCP_VERSION": "1.0", _STARTS: json.dumps(starts)}}
    end = 0
    for item in items:
        dtype, sizes = dtypes[item.index], _piece_of(item).sizes
        begin, end = end, end + math.prod(sizes) * dtype.itemsize
        header[item.index.fqn] = {"dtype": SFT_DTYPES[dtype], "shape": [*sizes], "data_offsets": [begin, end]}
    encoded = json.dumps(header, ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > _MAX_HEADER_BYTES:
        raise ValueError(f"{path}: its header is {len(encoded):,} bytes, readers take {_MAX_HEADER_BYTES:,}")
    with open(path, "xb") as file:
        stream = cast(BinaryIO, EagerFile(file))
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for item in items:
            stream.write(_bytes_of(item, planner))


def _bytes_of(item: WriteItem, planner: DefaultSavePlanner) -> memoryview:
    tensor = cast(Tensor, planner.resolve_data(item)).detach()
    plain = tensor.resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def _scan(folder: Path) -> tuple[_Known, _Places]:
    """Returns what is in a folder, checked: each tensor with its pieces, and which file each piece is in."""
    index = folder / INDEX
    with _blaming(index):
        _check_there(index)
        document = io.read_json(index)
        if type(document) is not dict or document.get("format") != _FORMAT:
            raise ValueError(f"is not of format {_FORMAT}")
        known = {name: _about_of(name, entry) for name, entry in document["tensors"].items()}
        for name in document["files"]:
            if type(name) is not str or not _FILE.fullmatch(name):
                raise ValueError(f"lists {name!r}, which is no file of it")
    places: _Places = {}
    for name in document["files"]:
        with _blaming(folder / name):
            _check_there(folder / name)
            _add_pieces(folder / name, known, places)
    with _blaming(index):
        for name, about in known.items():
            _check_cover(name, about)
    return known, places


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:
        raise ValueError(f"{path}: is not as it was written, {type(error).__name__}: {error}") from error


def _check_there(path: Path) -> None:
    if path.is_symlink() or not path.is_file():
        raise ValueError("is missing")


def _is_sizes(value: Any) -> bool:
    return type(value) is list and all(type(number) is int and 0 <= number < 1 << 63 for number in value)


def _about_of(name: str, entry: Any) -> TensorStorageMetadata:
    """Returns a tensor as the index describes it, with no pieces yet."""
    if not _is_sizes(entry["shape"]):
        raise ValueError(f"{name!r} has the shape {entry['shape']!r}")
    size, dtype = torch.Size(entry["shape"]), _DTYPES[entry["dtype"]]
    torch.empty(size, dtype=dtype, device="meta")  # raises where an integer overflows
    return TensorStorageMetadata(TensorProperties(dtype), size, [])


def _add_pieces(path: Path, known: _Known, places: _Places) -> None:
    """Adds the pieces that a file holds."""
    with safe_open(path, framework="pt") as file:
        starts = json.loads((file.metadata() or {}).get(_STARTS, "{}"))
        for name in file.keys():  # noqa: SIM118
            if name not in known:
                raise ValueError(f"holds {name!r}, which {INDEX} does not name")
            piece, size, dtype = file.get_slice(name), known[name].size, known[name].properties.dtype
            start, sizes, code = starts[name][_START], piece.get_shape(), piece.get_dtype()
            if code != SFT_DTYPES[dtype]:
                raise ValueError(f"holds {name!r} as {code}, {INDEX} says {SFT_DTYPES[dtype]}")
            if not _is_sizes(start) or not len(start) == len(sizes) == len(size):
                raise ValueError(f"has a piece of {name!r} of shape {sizes} that begins at {start!r} of {[*size]}")
            if not math.prod(sizes) or any(a + n > whole for a, n, whole in zip(start, sizes, size, strict=True)):
                raise ValueError(f"has a piece of {name!r}, {sizes} from {start}, that is not within {[*size]}")
            if MetadataIndex(name, start) in places:
                other = places[MetadataIndex(name, start)].name
                raise ValueError(f"has a piece of {name!r} from {start}, where {other} has one")
            places[MetadataIndex(name, start)] = path
            known[name].chunks.append(ChunkStorageMetadata(torch.Size(start), torch.Size(sizes)))


def _check_cover(name: str, about: TensorStorageMetadata) -> None:
    """Checks that a tensor's pieces, no two of which begin at one place, are the cells of a grid that is all of it.

    Raises:
        ValueError: there is a hole, or two overlap.
    """
    pieces = [piece for piece in about.chunks if math.prod(piece.sizes)]
    num_cells = 1 if math.prod(about.size) else 0
    for dim, length in enumerate(about.size) if num_cells else ():
        cuts = sorted({(piece.offsets[dim], piece.sizes[dim]) for piece in pieces})
        ends = [0, *(start + size for start, size in cuts)]
        if [start for start, _ in cuts] != ends[:-1] or ends[-1] != length:
            found = ", ".join(f"{start}-{start + size}" for start, size in cuts[:5])
            raise ValueError(f"the pieces of {name!r} have {found or 'nothing'} of its 0-{length} in dimension {dim}")
        num_cells *= len(cuts)
    if len(pieces) != num_cells:
        raise ValueError(f"{name!r} has {len(pieces)} pieces of {num_cells}")


def _fill(targets: Mapping[str, Tensor], known: _Known, places: _Places) -> None:
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(targets), Metadata(dict(known)))
    items_by_path = defaultdict(list)
    for item in planner.create_local_plan().items:
        items_by_path[places[item.storage_index]].append(item)
    for path, items in items_by_path.items():
        with _blaming(path), safe_open(path, framework="pt") as file:
            for item in items:
                piece = file.get_tensor(item.storage_index.fqn)  # mapped: what is not copied is not read
                spans = zip(item.storage_offsets, item.lengths, strict=True)
                part = piece[tuple(slice(start, start + length) for start, length in spans)]
                planner.resolve_tensor(item).detach().copy_(part)
