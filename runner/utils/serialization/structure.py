"""Describes the structure of weights files without their data, and writes placeholder files of that structure.

A description may be untrusted: `check_description` accepts only those that `write_placeholder` can write within bounds.
No function here executes the content of a file.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from runner.utils.files import disk
from runner.utils.serialization import (
    DTYPE_BY_SFT_CODE,
    MAX_HEADER_BYTES,
    FlattenedState,
    encode_sft_header,
    parse_dtype,
    torch_name,
    unflatten,
)

METADATA_KEY = "weights"  # an export's own record, left out of descriptions: it would nest with each run
# The largest number of elements of a tensor that is recorded with its values, such as a counter or a channel's mean.
_SMALL_NUMEL = 64
_MAX_TEXT_BYTES = 1 << 20  # of a folder's small files in all
_MAX_NUM_FILES = 200
_MAX_NUM_ENTRIES = 2000  # of a folder that is searched
_SIZE_FACTOR, _SIZE_FLOOR = 16, 256 << 20  # bytes of placeholders: times a run's weights, and a minimum
_SAMPLED_BYTES = 1 << 20
_TEXT_SUFFIXES = (".json", ".txt", ".yaml", ".yml")
_PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
_SFT, _PT, _NPY, _TEXT = "safetensors", "pt", "npy", "text"
_ARRAY = "array"  # the name of the only tensor of a .npy file
_MAX_NUM_OBJECTS = 20_000
_MAX_NUM_ITEMS = 1000
# Suffixes of parameters from which torch computes the attribute without the suffix in each forward.
_DERIVED_SUFFIXES = ("_orig", "_g", "_v")


def describe_weights_files(text: str) -> dict[str, Any] | None:
    """Returns the structure of the weights file, or the folder of weights files, at a path; None if there is none."""
    with contextlib.suppress(Exception):  # a file that can't be read, or not without executing its content
        path = Path(text).expanduser()
        if path.is_dir():
            return _describe_folder(path)
        if path.is_file() and (description := _describe_file(path)) is not None:
            return {"is_folder": False, "files": {path.name: description}}
    return None


def _describe_folder(folder: Path) -> dict[str, Any] | None:
    files = dict[str, Any]()
    texts = dict[str, Any]()
    num_bytes_left = _MAX_TEXT_BYTES
    for path in islice(sorted(_list_files(folder)), _MAX_NUM_ENTRIES):
        name = str(path.relative_to(folder))
        if path.suffix in _TEXT_SUFFIXES:
            if path.stat().st_size <= num_bytes_left:
                content = path.read_bytes()
                num_bytes_left -= len(content)
                texts[name] = {"kind": _TEXT, "text": content.decode()}
        elif (description := _describe_file(path)) is not None:
            files[name] = description
    return {"is_folder": True, "files": dict(islice((texts | files).items(), _MAX_NUM_FILES))} if files else None


def _list_files(folder: Path) -> Iterator[Path]:
    """Yields the regular files of a folder and of its subfolders, except hidden ones."""
    with os.scandir(folder) as entries:
        paths = [Path(entry.path) for entry in islice(entries, _MAX_NUM_ENTRIES) if not entry.name.startswith(".")]
    for path in paths:
        if path.is_file():
            yield path
        elif path.is_dir():
            with os.scandir(path) as inner:
                yield from (Path(entry.path) for entry in islice(inner, _MAX_NUM_ENTRIES) if entry.is_file())


def _describe_file(path: Path) -> dict[str, Any] | None:
    kind = _kind_of(path)
    if kind == _SFT:
        with safe_open(path, framework="pt") as file:
            tensors = {name: _describe_sft_tensor(file, name) for name in file.keys()}  # noqa: SIM118
            metadata = {key: text for key, text in (file.metadata() or {}).items() if key != METADATA_KEY}
            return {"kind": _SFT, **_size_and_digest(path), "tensors": tensors, "metadata": metadata}
    if kind == _PT:
        is_mapped = zipfile.is_zipfile(path)
        state = FlattenedState(torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped))
        tensors = {name: _describe_tensor(value) for name, value in state.tensors.items()}
        return {"kind": _PT, **_size_and_digest(path), "tensors": tensors, "document": state.document}
    if kind == _NPY:
        array = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
        return {"kind": _NPY, **_size_and_digest(path), "tensors": {_ARRAY: _describe_tensor(array)}}
    return None


def _kind_of(path: Path) -> str | None:
    """Returns the kind of a weights file by its first bytes, or None for any other file."""
    with path.open("rb") as file:
        start = file.read(16)
    if len(start) >= 9 and struct.unpack("<Q", start[:8])[0] <= MAX_HEADER_BYTES and start[8:9] == b"{":
        return _SFT
    if start.startswith(b"\x93NUMPY"):
        return _NPY
    if start.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(path) as archive:
            return _PT if any(name.endswith("/data.pkl") for name in archive.namelist()) else None
    return _PT if start.startswith(b"\x80\x02") and path.suffix in _PICKLE_SUFFIXES else None


def _describe_sft_tensor(file: Any, name: str) -> list[Any]:
    piece = file.get_slice(name)
    dtype, shape = DTYPE_BY_SFT_CODE[piece.get_dtype()], piece.get_shape()
    return _describe_tensor(file.get_tensor(name)) if math.prod(shape) <= _SMALL_NUMEL else [torch_name(dtype), shape]


def _describe_tensor(tensor: Tensor) -> list[Any]:
    """Returns dtype and shape, and for a small tensor its bytes in hexadecimal."""
    values = [_bytes_of(tensor).hex()] if tensor.numel() <= _SMALL_NUMEL else []
    return [torch_name(tensor.dtype), [*tensor.shape], *values]


def _bytes_of(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def _size_and_digest(path: Path) -> dict[str, Any]:
    """Returns a file's size in bytes, and the SHA-256 digest of its first and last MiB."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = sha256(file.read(_SAMPLED_BYTES))
        file.seek(max(size - _SAMPLED_BYTES, 0))
        digest.update(file.read(_SAMPLED_BYTES))
    return {"bytes": size, "sha256": digest.hexdigest()}


def matches_description(text: str, entry: Mapping[str, Any]) -> bool:
    """Returns whether the file or folder at a path matches its description, by size and first and last MiB."""
    try:
        for name, description in entry["files"].items():
            path = Path(text, name if entry["is_folder"] else "").expanduser()
            if not path.is_file() or not _file_matches(path, description):
                return False
    except (OSError, ValueError, RuntimeError):  # also a name that no disk can have, or ~USER of an unknown user
        return False
    return True


def _file_matches(path: Path, description: Mapping[str, Any]) -> bool:
    if description["kind"] == _TEXT:
        return path.stat().st_size <= _MAX_TEXT_BYTES and path.read_bytes() == description["text"].encode()
    return _size_and_digest(path) == {key: description[key] for key in ("bytes", "sha256")}


def check_description(entry: Any) -> None:
    """Checks that `describe_weights_files` could have returned a description.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: the description is invalid.
    """
    is_folder, files = entry["is_folder"], entry["files"]
    max_num_files = _MAX_NUM_FILES if is_folder else 1
    if type(is_folder) is not bool or type(entry["path"]) is not str or not 0 < len(files) <= max_num_files:
        raise ValueError("not the description of a file or folder")
    for name, description in files.items():
        parts = name.split("/")
        is_hidden_or_invalid = any(part == "" or part.startswith(".") or len(part) > 255 for part in parts)
        if "\0" in name or len(parts) > 2 or is_hidden_or_invalid:
            raise ValueError(f"{name!r}: no file of it")
        if description["kind"] == _TEXT:
            if not is_folder or Path(name).suffix not in _TEXT_SUFFIXES or type(description["text"]) is not str:
                raise ValueError(f"{name!r}: no text")
            continue
        if description["kind"] not in (_SFT, _PT, _NPY):
            raise ValueError(f"{name!r}: no weights")
        for tensor_name, (dtype, shape, *values) in description["tensors"].items():
            _check_tensor(tensor_name, dtype, shape, values)
        if description["kind"] == _SFT and not all(type(text) is str for text in description["metadata"].values()):
            raise ValueError(f"{name!r}: no metadata")


def _check_tensor(name: str, dtype: Any, shape: Any, values: list[Any]) -> None:
    is_shape = type(shape) is list and len(shape) <= 64 and all(type(n) is int and 0 <= n < 1 << 63 for n in shape)
    if type(dtype) is not str or not is_shape or len(values) > 1:
        raise ValueError(f"{name!r}: no tensor")
    expected = math.prod(shape) * parse_dtype(dtype).itemsize
    if values and (math.prod(shape) > _SMALL_NUMEL or len(bytes.fromhex(values[0])) != expected):
        raise ValueError(f"{name!r}: values of another size")


def write_placeholder(
    folder: Path, text: str, entry: Mapping[str, Any] | None, saved: Mapping[str, Any], *, fills_with_ones: bool = False
) -> Path:
    """Writes a placeholder for the file or folder at the path `text`; returns its path, which has the same name.

    Args:
        folder: an empty folder.
        text: the path of the missing file or folder.
        entry: the description; None: the file holds the run's saved weights, in the format of its suffix.
        saved: the run's saved weights, used for tensors of the same name and shape.
        fills_with_ones: True: values that are not recorded are ones; False: saved weights, else zeros.
    Raises:
        ValueError: the description is inconsistent.
        OSError: the file can't be written.
    """
    tensors = {name: value for name, value in saved.items() if isinstance(value, Tensor)}
    name = Path(text).name
    path = folder / (name if name not in ("", "..") else "weights")
    if entry is None:
        _write_saved(path, tensors, fills_with_ones=fills_with_ones)
        return path
    for inner, description in entry["files"].items():
        target = path / inner if entry["is_folder"] else path
        for parent in (path, target.parent) if entry["is_folder"] else ():
            if not parent.is_dir():
                disk.make_folder(parent)
        if description["kind"] == _TEXT:
            with disk.create(target, "xb") as file:
                file.write(description["text"].encode())
        else:
            _write_file(target, description, _TensorValues(description["tensors"], tensors, fills_with_ones))
    return path


def count_bytes(entry: Mapping[str, Any] | None, saved: Mapping[str, Any]) -> int:
    """Returns the size in bytes of a placeholder's tensors; the arguments are those of `write_placeholder`."""
    if entry is None:
        return sum(value.nbytes for value in saved.values() if isinstance(value, Tensor))
    files = [description for description in entry["files"].values() if description["kind"] != _TEXT]
    tensors = [tensor for description in files for tensor in description["tensors"].values()]
    return sum(math.prod(shape) * parse_dtype(dtype).itemsize for dtype, shape, *_ in tensors)


def max_placeholder_bytes(weights: Mapping[str, Any]) -> int:
    """Returns the maximum size in bytes of all placeholders together, for a run with these saved parts."""
    parts = [part for part in weights.values() if isinstance(part, Mapping)]
    return max(_SIZE_FACTOR * sum(count_bytes(None, part) for part in parts), _SIZE_FLOOR)


@dataclass
class _TensorValues:
    """The values of a placeholder's tensors: recorded values, saved weights, or a fill value."""

    described: Mapping[str, list[Any]]
    saved: Mapping[str, Tensor]
    fills_with_ones: bool

    def find(self, name: str) -> Tensor | None:
        """Returns a tensor's values; None means zeros."""
        dtype, shape, *recorded = self.described[name]
        if recorded and math.prod(shape):
            flat = torch.frombuffer(bytearray(bytes.fromhex(recorded[0])), dtype=torch.uint8)
            return flat.view(parse_dtype(dtype)).reshape(shape)
        if self.fills_with_ones:
            return torch.ones(shape, dtype=torch.float32).to(parse_dtype(dtype))
        parts = name.split(".")
        for start in range(len(parts)):  # the file may name a tensor with a prefix that the model does not have
            saved = self.saved.get(".".join(parts[start:]))
            if saved is not None and [*saved.shape] == shape:
                return saved.detach().to(parse_dtype(dtype))
        return None

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape, *_ = self.described[name]
        values = self.find(name)
        # Cloned, because torch.save would store two names of one tensor as tied.
        return torch.zeros(shape, dtype=parse_dtype(dtype)) if values is None else values.clone()


def _write_file(path: Path, description: Mapping[str, Any], values: _TensorValues) -> None:
    if description["kind"] == _SFT:
        described = {name: (parse_dtype(dtype), shape) for name, (dtype, shape, *_) in description["tensors"].items()}
        _write_sft(path, described, description["metadata"], values.find)
        return
    if description["kind"] == _NPY:
        with disk.create(path, "xb") as file:
            np.save(file, values[_ARRAY].numpy(), allow_pickle=False)
        return
    try:
        value = unflatten(description["document"], {name: values[name] for name in description["tensors"]})
    except Exception as error:
        raise ValueError(f"{path.name}: its recorded structure does not fit its tensors ({error!r})") from error
    torch.save(value, path)


def _write_saved(path: Path, tensors: Mapping[str, Tensor], *, fills_with_ones: bool) -> None:
    values = {name: torch.ones_like(value) if fills_with_ones else value for name, value in tensors.items()}
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
    """Writes a SafeTensors file; tensors of zeros become holes, which use no space in most file systems."""
    header, ordered = encode_sft_header(path, described, metadata)
    with disk.create(path, "xb") as file:
        file.write(header)
        for name in ordered:
            if (tensor := find(name)) is not None:
                file.write(_bytes_of(tensor))
            else:
                dtype, shape = described[name]
                file.seek(math.prod(shape) * dtype.itemsize, os.SEEK_CUR)
        file.truncate()


def find_unsaved(module: nn.Module) -> dict[str, str]:
    """Returns digests of the values in a module that its state dict does not hold, by their dotted paths.

    Attributes and items are searched at any depth, also in modules that are not registered.
    """
    saved_ids = set[int]()
    with contextlib.suppress(Exception):  # raised by the module's own methods
        state = module.state_dict(keep_vars=True)
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        saved_ids = {id(value) for value in state.values()} | {id(value) for name, value in named if name in state}
    digests = ((path, _digest(value)) for path, value in _walk(module) if id(value) not in saved_ids)
    return {path: digest for path, digest in digests if digest is not None}


def _digest(value: Any) -> str | None:
    if isinstance(value, float):
        return value.hex()
    with contextlib.suppress(Exception):  # a tensor subclass without plain bytes
        if isinstance(value, Tensor):
            return sha256(_bytes_of(value)).hexdigest()
        if isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
            return sha256(value.tobytes()).hexdigest()
    return None


def _walk(root: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the dotted path and value of each object in a module at any depth, breadth first, each object once."""
    queue: list[tuple[str, Any]] = [("", root)]
    seen: dict[int, Any] = {}  # keeps the objects alive, so that no id is used twice
    for path, holder in queue:
        yield path, holder
        for name, child in _children(holder):
            child_path = f"{path}.{name}".lstrip(".")
            if isinstance(child, float):
                yield child_path, child
            elif id(child) not in seen and len(seen) < _MAX_NUM_OBJECTS:
                seen[id(child)] = child
                queue.append((child_path, child))


def _children(holder: Any) -> Iterator[tuple[Any, Any]]:
    match holder:
        case nn.Module():
            tensors = {**holder._parameters, **holder._buffers}
            yield from holder._modules.items()
            yield from tensors.items()
            skipped = {"_parameters", "_buffers", "_modules"}
            for name, value in vars(holder).items():
                if name not in skipped and not any(name + suffix in tensors for suffix in _DERIVED_SUFFIXES):
                    yield name, value
        case Mapping():
            yield from islice(holder.items(), _MAX_NUM_ITEMS)
        case list() | tuple() | set() | frozenset():
            yield from islice(enumerate(holder), _MAX_NUM_ITEMS)
        case type() | Tensor() | np.ndarray():
            return
        case _ if hasattr(holder, "__dict__") and not callable(holder):
            yield from islice(vars(holder).items(), _MAX_NUM_ITEMS)
