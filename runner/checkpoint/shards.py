"""Tensors of many ranks, each rank writing its own share of them as SafeTensors; nothing on disk is a pickle.

Owns the layout. `shards.json` has each tensor's dtype and whole shape and lists the files. `shard-00000.safetensors`
has what rank 0 wrote: pieces under their tensors' names and, in its metadata, where each piece begins, in the words of
`torch.distributed.checkpoint.HuggingFaceStorageReader`, which reads them too. That package's planners tell which piece
is whose; its `save`, which exchanges whole plans, takes several times as long. Must not know what the tensors are of.
Importing it takes half a second: it is for those who have several ranks, or files of them.
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
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, metadata

from runner.utils import io
from runner.utils.distributed import is_distributed, run_on_all_ranks
from runner.utils.files import EagerFile, disk
from runner.utils.serialization import SFT_DTYPES, name_of

INDEX = "shards.json"
_FORMAT = 1
_FILE = re.compile(r"shard-\d{5,}\.safetensors", re.ASCII)
_STARTS, _START = "DCP_SHARDING_INFO", "saved_offsets"  # torch's names for where a piece begins
_DTYPES = {code: dtype for dtype, code in SFT_DTYPES.items()}
_Piece = tuple[str, tuple[int, ...], tuple[int, ...]]  # of which tensor, where in it it begins, and its shape
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
    own: dict[_Piece, Tensor] = {}

    def look() -> tuple[str, list[_Piece]]:
        own.update(_local_pieces(tensors))
        return sha256(json.dumps(_described(tensors), sort_keys=True).encode()).hexdigest(), [*own]

    digests, held = zip(*run_on_all_ranks(look, group), strict=True)
    if len(set(digests)) > 1:
        raise ValueError("the names, dtypes or shapes of the tensors are not the same on every rank")
    _check_cover(tensors, {piece for pieces in held for piece in pieces})
    shares = _share_out(held, tensors)
    names = {number: f"shard-{number:05d}.safetensors" for number, share in enumerate(shares) if share}
    number = dist.get_rank(group) if is_distributed() else 0

    def write_share() -> None:
        if number in names:
            _write_pieces(folder / names[number], {piece: own[piece] for piece in shares[number]})
        if number == 0:
            document = {"format": _FORMAT, "files": [*names.values()], "tensors": _described(tensors)}
            io.write_new_json(document, folder / INDEX, indent=None)

    refused = run_on_all_ranks(lambda: _refusal_of(write_share, folder / names.get(number, INDEX)), group)
    for rank, refusal in enumerate(refused):
        if refusal is not None:
            code, reason, file = refusal
            raise OSError(code, f"rank {rank}: {reason}", file)


def read(folder: Path, is_wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """Returns every tensor whole, on the CPU; it needs no process group. The files may be a stranger's.

    Args:
        is_wanted: says of a name whether its tensor is read.
    Raises:
        ValueError: naming the file and its fault: it is missing, broken, or contradicts another.
        OSError: the disk can't be read.
    """
    known, places = _scan(folder)
    tensors = {name: torch.empty(like.shape, dtype=like.dtype) for name, like in known.items() if is_wanted(name)}
    _fill(tensors, places)
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
        found, expected = _text_of(known.get(name)), _text_of(target)
        if found != expected:
            raise ValueError(f"{folder / INDEX}: {name!r} is {found}, not {expected}")
    _fill(targets, places)


@torch.no_grad()
def _local_pieces(tensors: Mapping[str, Tensor]) -> dict[_Piece, Tensor]:
    """Returns what this rank has of tensors that can be written."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name!r} is a {type(tensor).__qualname__}, expected a tensor")
        if tensor.layout is not torch.strided or tensor.dtype not in SFT_DTYPES:
            raise TypeError(f"{name!r} is {name_of(tensor.dtype)} as {tensor.layout}, which SafeTensors can't hold")
        if name.encode() == b"__metadata__":  # a lone surrogate is a ValueError
            raise ValueError(f"{name!r} is a name that SafeTensors use themselves")
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors))
    pieces = {}
    for item in planner.create_local_plan().items:
        assert item.tensor_data is not None
        chunk, local = item.tensor_data.chunk, cast(Tensor, planner.resolve_data(item)).detach()
        if local.shape != chunk.sizes:  # as DTensor.from_local makes it of an uneven part without the whole's shape
            raise ValueError(f"{item.index.fqn!r} has a part {[*local.shape]}, its placement says {[*chunk.sizes]}")
        if local.numel():
            pieces[item.index.fqn, tuple(chunk.offsets), tuple(chunk.sizes)] = local
    return pieces


def _share_out(held: Sequence[Sequence[_Piece]], tensors: Mapping[str, Tensor]) -> list[list[_Piece]]:
    """Returns what each rank writes of what each holds: what several hold goes to the one that has least to write."""
    holders = defaultdict(list)
    for number, pieces in enumerate(held):
        for piece in pieces:
            holders[piece].append(number)
    bytes_of = {piece: math.prod(piece[2]) * tensors[piece[0]].dtype.itemsize for piece in holders}
    loads, shares = [0] * len(held), [list[_Piece]() for _ in held]
    for piece in sorted(holders, key=lambda piece: (len(holders[piece]), -bytes_of[piece])):
        number = min(holders[piece], key=loads.__getitem__)
        loads[number] += bytes_of[piece]
        shares[number].append(piece)
    return shares


def _described(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: {"dtype": SFT_DTYPES[each.dtype], "shape": [*each.shape]} for name, each in tensors.items()}


def _text_of(tensor: Tensor | None) -> str:
    return "not there" if tensor is None else f"{name_of(tensor.dtype)}{[*tensor.shape]}"


def _refusal_of(work: Callable[[], None], path: Path) -> tuple[int, str, str] | None:
    """Returns what the disk had against it, as an `OSError` is made of: number, reason and file."""
    try:
        work()
    except OSError as error:
        return error.errno or errno.EIO, error.strerror or str(error), str(error.filename or path)
    return None


def _write_pieces(path: Path, pieces: Mapping[_Piece, Tensor]) -> None:
    """Writes a SafeTensors file; of pieces on a device one at a time is copied."""
    ordered = sorted(pieces.items(), key=lambda pair: -pair[1].dtype.itemsize)  # keeps every tensor aligned
    starts = {name: {_START: [*start]} for name, start, _ in pieces}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "DCP_VERSION": "1.0", _STARTS: json.dumps(starts)}}
    end = 0
    for (name, _, sizes), tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": SFT_DTYPES[tensor.dtype], "shape": [*sizes], "data_offsets": [begin, end]}
    encoded = json.dumps(header, ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > _MAX_HEADER_BYTES:
        raise ValueError(f"{path}: its header is {len(encoded):,} bytes, readers take {_MAX_HEADER_BYTES:,}")
    with disk.create(path, "xb") as file:
        stream = cast(BinaryIO, EagerFile(file))
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for _, tensor in ordered:
            flat = tensor.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
            stream.write(flat.view(torch.uint8).numpy().data)


def _scan(folder: Path) -> tuple[dict[str, Tensor], dict[_Piece, Path]]:
    """Returns what is in a folder, checked: tensors without content, and which file each piece of them is in."""
    index = folder / INDEX
    with _blaming(index):
        document = io.read_json(index)
        if type(document) is not dict or document.get("format") != _FORMAT:
            raise ValueError(f"is not of format {_FORMAT}")
        known = {name: _described_by(name, entry) for name, entry in document["tensors"].items()}
        for name in document["files"]:
            if type(name) is not str or not _FILE.fullmatch(name):
                raise ValueError(f"lists {name!r}, which is no file of it")
    places: dict[_Piece, Path] = {}
    for name in document["files"]:
        with _blaming(folder / name):
            for piece in _pieces_in(folder / name, known):
                if piece in places:
                    raise ValueError(f"has a piece of {piece[0]!r} that {places[piece].name} has too")
                places[piece] = folder / name
    with _blaming(index):
        _check_cover(known, places)
    return known, places


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
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


def _described_by(name: str, entry: Any) -> Tensor:
    """Returns a tensor without content; where its bytes can't be counted it raises."""
    if not _is_sizes(entry["shape"]):
        raise ValueError(f"{name!r} has the shape {entry['shape']!r}")
    return torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="meta")


def _pieces_in(path: Path, known: Mapping[str, Tensor]) -> Iterator[_Piece]:
    """Yields the pieces that a file holds, each within its tensor."""
    with safe_open(path, framework="pt") as file:
        starts = json.loads((file.metadata() or {}).get(_STARTS, "{}"))
        for name in file.keys():  # noqa: SIM118
            if name not in known:
                raise ValueError(f"holds {name!r}, which {INDEX} does not name")
            piece, whole, code = file.get_slice(name), known[name].shape, SFT_DTYPES[known[name].dtype]
            start, sizes = starts[name][_START], piece.get_shape()
            if piece.get_dtype() != code:
                raise ValueError(f"holds {name!r} as {piece.get_dtype()}, {INDEX} says {code}")
            if not _is_sizes(start) or not len(start) == len(sizes) == len(whole):
                raise ValueError(f"has a piece of {name!r} of shape {sizes} that begins at {start!r} of {[*whole]}")
            if not math.prod(sizes) or any(a + n > size for a, n, size in zip(start, sizes, whole, strict=True)):
                raise ValueError(f"has a piece of {name!r}, {sizes} from {start}, that is not within {[*whole]}")
            yield name, tuple(start), tuple(sizes)


def _check_cover(tensors: Mapping[str, Tensor], pieces: Iterable[_Piece]) -> None:
    """Raises ValueError unless a tensor's pieces are the cells of a grid that is all of it, as meshes make them."""
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


@torch.no_grad()
def _fill(targets: Mapping[str, Tensor], places: Mapping[_Piece, Path]) -> None:
    """Copies into tensors, or this rank's parts of them, what of the pieces belongs there."""
    known, path_of = {}, {}
    for name, target in targets.items():
        known[name] = metadata.TensorStorageMetadata(metadata.TensorProperties(target.dtype), target.shape, [])
    for (name, start, sizes), path in places.items():
        if name in known:
            known[name].chunks.append(metadata.ChunkStorageMetadata(torch.Size(start), torch.Size(sizes)))
            path_of[metadata.MetadataIndex(name, start)] = path
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(targets), metadata.Metadata(dict(known)))
    items_by_path = defaultdict(list)
    for item in planner.create_local_plan().items:
        items_by_path[path_of[item.storage_index]].append(item)
    for path, items in items_by_path.items():
        with safe_open(path, framework="pt") as file:
            for item in items:
                piece = file.get_tensor(item.storage_index.fqn)  # mapped: what is not copied is not read
                spans = zip(item.storage_offsets, item.lengths, strict=True)
                part = piece[tuple(slice(start, start + length) for start, length in spans)]
                planner.resolve_tensor(item).copy_(part)
