"""The structure of weights files: described without tensor data, compared, and written again with other values.

A description may be a stranger's: `check` accepts only what `write` can write within bounds. Nothing here runs what is
in a file. Importing it imports torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from runner.utils.files import disk
from runner.utils.serialization import SFT_DTYPES, FlattenedState, dtype_of, name_of, unpack

METADATA_KEY = "weights"  # an export's: what its own run recorded, which would nest at each warm start
_MAX_HEADER_BYTES = 100_000_000  # the limit that safetensors readers set
_SMALL_NUMEL = 64  # a tensor up to this size is recorded with its values: a count, a mean of each channel
_MAX_TEXT_BYTES = 1 << 20  # of a folder's small files in all
_MAX_NUM_FILES = 200
_MAX_NUM_ENTRIES = 2000  # of a folder that is searched
_SIZE_FACTOR, _SIZE_FLOOR = 16, 256 << 20  # how much larger than a run's weights a stand-in may be, in bytes
_SAMPLED_BYTES = 1 << 20
_TEXTS = (".json", ".txt", ".yaml", ".yml")
_OLD_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
_SFT, _PT, _NPY, _TEXT = "safetensors", "pt", "npy", "text"
_ARRAY = "array"  # the name of the only tensor of a .npy file
_DTYPES = {code: dtype for dtype, code in SFT_DTYPES.items()}
_MOST_OBJECTS = 20_000
_MOST_ITEMS = 1000
_DERIVED = ("_orig", "_g", "_v")  # torch computes `weight` of these parameters anew in each forward


def describe(text: str) -> dict[str, Any] | None:
    """Returns the structure of the weights file, or of the folder of weights files, at a path; None for no such."""
    try:
        path = Path(text).expanduser()
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            found = _describe_file(path)
            return None if found is None else {"is_folder": False, "files": {path.name: found}}
        return _describe_folder(path) if stat.S_ISDIR(mode) else None
    except Exception:  # one that can't be read without running what is in it, or not at all
        return None


def _describe_folder(folder: Path) -> dict[str, Any] | None:
    files: dict[str, Any] = {}
    texts, left = dict[str, Any](), _MAX_TEXT_BYTES
    for path in islice(sorted(_files_in(folder)), _MAX_NUM_ENTRIES):
        name = str(path.relative_to(folder))
        if path.suffix in _TEXTS:
            if path.stat().st_size <= left:
                content = path.read_bytes()
                left -= len(content)
                texts[name] = {"kind": _TEXT, "text": content.decode()}
        elif (found := _describe_file(path)) is not None:
            files[name] = found
    return {"is_folder": True, "files": dict(islice((texts | files).items(), _MAX_NUM_FILES))} if files else None


def _files_in(folder: Path) -> Iterator[Path]:
    """Yields the regular files of a folder and of the folders in it, hidden ones left out."""
    with os.scandir(folder) as entries:
        found = [Path(each.path) for each in islice(entries, _MAX_NUM_ENTRIES) if not each.name.startswith(".")]
    for path in found:
        if path.is_file():
            yield path
        elif path.is_dir():
            with os.scandir(path) as inner:
                yield from (Path(each.path) for each in islice(inner, _MAX_NUM_ENTRIES) if each.is_file())


def _describe_file(path: Path) -> dict[str, Any] | None:
    kind = _kind_of(path)
    if kind == _SFT:
        with safe_open(path, framework="pt") as file:
            tensors = {name: _describe_slice(file, name) for name in file.keys()}  # noqa: SIM118
            metadata = {key: text for key, text in (file.metadata() or {}).items() if key != METADATA_KEY}
            return {"kind": _SFT, **_identify(path), "tensors": tensors, "metadata": metadata}
    if kind == _PT:
        is_mapped = zipfile.is_zipfile(path)
        packed = FlattenedState(torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped))
        tensors = {name: _describe_tensor(each.dtype, [*each.shape], each) for name, each in packed.tensors.items()}
        return {"kind": _PT, **_identify(path), "tensors": tensors, "document": packed.document}
    if kind == _NPY:
        array = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
        return {
            "kind": _NPY,
            **_identify(path),
            "tensors": {_ARRAY: _describe_tensor(array.dtype, [*array.shape], array)},
        }
    return None


def _kind_of(path: Path) -> str | None:
    """Returns which kind of weights file a regular file is by its first bytes; None for another."""
    with path.open("rb") as file:
        start = file.read(16)
    if len(start) >= 9 and struct.unpack("<Q", start[:8])[0] <= _MAX_HEADER_BYTES and start[8:9] == b"{":
        return _SFT
    if start.startswith(b"\x93NUMPY"):
        return _NPY
    if start.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(path) as archive:
            return _PT if any(name.endswith("/data.pkl") for name in archive.namelist()) else None
    return _PT if start.startswith(b"\x80\x02") and path.suffix in _OLD_PICKLES else None


def _describe_slice(file: Any, name: str) -> list[Any]:
    piece = file.get_slice(name)
    shape = piece.get_shape()
    is_small = math.prod(shape) <= _SMALL_NUMEL
    return _describe_tensor(_DTYPES[piece.get_dtype()], shape, file.get_tensor(name) if is_small else None)


def _describe_tensor(dtype: torch.dtype, shape: list[int], tensor: Tensor | None) -> list[Any]:
    """Returns dtype and shape, and the bytes of a small tensor in hexadecimal."""
    is_small = tensor is not None and math.prod(shape) <= _SMALL_NUMEL
    return [name_of(dtype), shape, *([_bytes_of(tensor).hex()] if tensor is not None and is_small else [])]


def _bytes_of(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
    flat: bytes = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return flat


def _identify(path: Path) -> dict[str, Any]:
    """Returns a file's size, and the digest of its first and last MiB."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = sha256(file.read(_SAMPLED_BYTES))
        file.seek(max(size - _SAMPLED_BYTES, 0))
        digest.update(file.read(_SAMPLED_BYTES))
    return {"bytes": size, "sha256": digest.hexdigest()}


def is_same(text: str, entry: Mapping[str, Any]) -> bool:
    """Says whether what lies at a path is what was described there; by size, first and last bytes."""
    try:
        for name, found in entry["files"].items():
            path = Path(text, name) if entry["is_folder"] else Path(text)
            path = path.expanduser()
            if not stat.S_ISREG(path.stat().st_mode):
                return False
            if found["kind"] == _TEXT:
                if path.stat().st_size > _MAX_TEXT_BYTES or path.read_bytes() != found["text"].encode():
                    return False
            elif _identify(path) != {key: found[key] for key in ("bytes", "sha256")}:
                return False
    except (OSError, ValueError, RuntimeError):  # also of a name that the disk can't have, or a home of nobody
        return False
    return True


def check(entry: Any) -> None:
    """Checks that a description is one that `describe` could have made.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it is not.
    """
    is_folder, files = entry["is_folder"], entry["files"]
    if type(is_folder) is not bool or type(entry["path"]) is not str or not 0 < len(files) <= _MAX_NUM_FILES:
        raise ValueError("not the description of a file or folder")
    if not is_folder and len(files) != 1:
        raise ValueError("several files in the place of one")
    for name, found in files.items():
        parts = name.split("/")
        if (
            "\0" in name
            or len(parts) > 2
            or any(part in ("", "..") or part.startswith(".") or len(part) > 255 for part in parts)
        ):
            raise ValueError(f"{name!r}: no file of it")
        if found["kind"] == _TEXT:
            if not is_folder or Path(name).suffix not in _TEXTS or type(found["text"]) is not str:
                raise ValueError(f"{name!r}: no text")
            continue
        if found["kind"] not in (_SFT, _PT, _NPY):
            raise ValueError(f"{name!r}: no weights")
        for place, (dtype, shape, *values) in found["tensors"].items():
            _check_tensor(place, dtype, shape, values)
        if found["kind"] == _SFT and not all(type(text) is str for text in found["metadata"].values()):
            raise ValueError(f"{name!r}: no metadata")


def _check_tensor(place: str, dtype: Any, shape: Any, values: list[Any]) -> None:
    is_shape = type(shape) is list and len(shape) <= 64 and all(type(n) is int and 0 <= n < 1 << 63 for n in shape)
    if type(dtype) is not str or not is_shape or len(values) > 1:
        raise ValueError(f"{place!r}: no tensor")
    expected = math.prod(shape) * dtype_of(dtype).itemsize
    if values and (math.prod(shape) > _SMALL_NUMEL or len(bytes.fromhex(values[0])) != expected):
        raise ValueError(f"{place!r}: values of another size")


def write(
    folder: Path, text: str, entry: Mapping[str, Any] | None, own: Mapping[str, Any], *, fills_with_ones: bool = False
) -> Path:
    """Writes a stand-in for the file or folder at a path; returns its path, with the same name.

    Args:
        folder: empty.
        entry: the description; None stands for the run's own weights in the format that the suffix says.
        own: the run's own weights, for tensors of the same name and shape.
        fills_with_ones: all values are ones but those recorded; else own weights, or zeros.
    Raises:
        ValueError: the description can't be followed.
        OSError: the disk refused.
    """
    tensors = {name: value for name, value in own.items() if isinstance(value, Tensor)}
    name = Path(text).name
    path = folder / (name if name not in ("", "..") else "weights")
    if entry is None:
        _write_own(path, tensors, fills_with_ones=fills_with_ones)
        return path
    for inner, found in entry["files"].items():
        target = path / inner if entry["is_folder"] else path
        for parent in (path, target.parent) if entry["is_folder"] else ():
            if not parent.is_dir():
                disk.make_folder(parent)
        if found["kind"] == _TEXT:
            with disk.create(target, "xb") as file:
                file.write(found["text"].encode())
        else:
            values = _Values(found["tensors"], tensors, fills_with_ones=fills_with_ones)
            _write_file(target, found, values)
    return path


def count_bytes(entry: Mapping[str, Any] | None, own: Mapping[str, Any]) -> int:
    """Returns how large the tensors of a stand-in are; the arguments are those of `write`."""
    if entry is None:
        return sum(value.nbytes for value in own.values() if isinstance(value, Tensor))
    described = [found["tensors"].values() for found in entry["files"].values() if found["kind"] != _TEXT]
    return sum(math.prod(shape) * dtype_of(dtype).itemsize for tensors in described for dtype, shape, *_ in tensors)


def most_bytes(weights: Mapping[str, Any]) -> int:
    """Returns how large all stand-ins of a run with these saved parts may be together."""
    parts = [part for part in weights.values() if isinstance(part, Mapping)]
    return max(_SIZE_FACTOR * sum(count_bytes(None, part) for part in parts), _SIZE_FLOOR)


class _Values:
    """The values of a stand-in's tensors: those recorded, a run's own, or a fill."""

    def __init__(self, described: Mapping[str, list[Any]], own: Mapping[str, Tensor], *, fills_with_ones: bool) -> None:
        self._described, self._own, self._fills_with_ones = described, own, fills_with_ones

    def find(self, name: str) -> Tensor | None:
        """Returns a tensor's values; None stands for zeros."""
        dtype, shape, *recorded = self._described[name]
        if recorded and math.prod(shape):
            flat = torch.frombuffer(bytearray(bytes.fromhex(recorded[0])), dtype=torch.uint8)
            return flat.view(dtype_of(dtype)).reshape(shape)
        if self._fills_with_ones:
            return torch.ones(shape, dtype=torch.float32).to(dtype_of(dtype))
        suffix = name
        while True:
            own = self._own.get(suffix)
            if own is not None and [*own.shape] == shape:
                return own.detach().to(dtype_of(dtype))
            if "." not in suffix:
                return None
            suffix = suffix.partition(".")[2]

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape, *_ = self._described[name]
        found = self.find(name)
        # Cloned, as two names of one tensor would be tied in the file.
        return torch.zeros(shape, dtype=dtype_of(dtype)) if found is None else found.clone()


def _write_file(path: Path, found: Mapping[str, Any], values: _Values) -> None:
    if found["kind"] == _SFT:
        described = {name: (dtype_of(dtype), shape) for name, (dtype, shape, *_) in found["tensors"].items()}
        _write_sft(path, described, found["metadata"], values.find)
        return
    if found["kind"] == _NPY:
        with disk.create(path, "xb") as file:
            np.save(file, values[_ARRAY].numpy(), allow_pickle=False)
        return
    try:
        value = unpack(found["document"], {name: values[name] for name in found["tensors"]})
    except Exception as error:
        raise ValueError(f"{path.name}: its recorded structure does not fit its tensors ({error!r})") from error
    torch.save(value, path)


def _write_own(path: Path, tensors: Mapping[str, Tensor], *, fills_with_ones: bool) -> None:
    values = {n: torch.ones_like(t) for n, t in tensors.items()} if fills_with_ones else dict(tensors)
    if path.suffix in (".safetensors", ".sft"):
        described = {name: (tensor.dtype, [*tensor.shape]) for name, tensor in values.items()}
        _write_sft(path, described, {"format": "pt"}, values.__getitem__)
    else:
        torch.save(values, path)


def _write_sft(
    path: Path,
    described: Mapping[str, tuple[torch.dtype, list[int]]],
    metadata: Mapping[str, str],
    find: Callable[[str], Tensor | None],
) -> None:
    """Writes a SafeTensors file; zeros are holes, which take no room on most disks."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in sorted(described, key=lambda name: -described[name][0].itemsize):  # keeps every tensor aligned
        dtype, shape = described[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SFT_DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with disk.create(path, "xb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        start = file.tell()
        for name in described:
            if (tensor := find(name)) is not None:
                file.seek(start + header[name]["data_offsets"][0])
                file.write(_bytes_of(tensor))
        file.truncate(start + end)


def find_unsaved(module: nn.Module) -> dict[str, str]:
    """Returns digests of the values that a module holds and that its state does not, by where they are.

    Searched are attributes and items, modules that are not registered too.
    """
    known = set[int]()
    with contextlib.suppress(Exception):  # of the module's own methods
        saved = module.state_dict(keep_vars=True)
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        known = {id(value) for value in saved.values()} | {id(value) for name, value in named if name in saved}
    digests = ((place, _digest(held)) for place, held in _walk(module) if id(held) not in known)
    return {place: digest for place, digest in digests if digest is not None}


def _digest(value: Any) -> str | None:
    """Returns a digest of a number's or a dense array's value; None of anything else."""
    if isinstance(value, float):
        return value.hex()
    with contextlib.suppress(Exception):  # of a kind of tensor without plain bytes
        if isinstance(value, Tensor):
            return sha256(_bytes_of(value)).hexdigest()
        if isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
            return sha256(value.tobytes()).hexdigest()
    return None


def _walk(root: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields what a module holds at any depth with its place, each object once."""
    queue: list[tuple[str, Any]] = [("", root)]
    seen: dict[int, Any] = {}  # holds the objects, so that no id comes again
    for place, held in queue:
        yield place, held
        for name, child in _children(held):
            if isinstance(child, float):
                yield f"{place}.{name}".lstrip("."), child
            elif id(child) not in seen and len(seen) < _MOST_OBJECTS:
                seen[id(child)] = child
                queue.append((f"{place}.{name}".lstrip("."), child))


def _children(held: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(held, nn.Module):
        tables = {**held._parameters, **held._buffers}
        yield from held._modules.items()
        yield from held._parameters.items()
        yield from held._buffers.items()
        skipped = {"_parameters", "_buffers", "_modules"}
        for name, value in vars(held).items():
            if name not in skipped and not any(name + suffix in tables for suffix in _DERIVED):
                yield name, value
    elif isinstance(held, Mapping):
        yield from islice(held.items(), _MOST_ITEMS)
    elif isinstance(held, (list, tuple, set, frozenset)):
        yield from islice(enumerate(held), _MOST_ITEMS)
    elif not isinstance(held, (type, Tensor, np.ndarray)) and hasattr(held, "__dict__") and not callable(held):
        yield from islice(vars(held).items(), _MOST_ITEMS)
