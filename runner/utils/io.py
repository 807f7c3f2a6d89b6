"""Values on disk: nests of plain values and tensors as `.pt` or `.safetensors`, and JSON; every write is atomic.

Imports torch, safetensors and the standard library. Both tensor formats pass through one
packing of the value, so what one refuses or gives back, the other does. A value is stored when it is made of these, by
exact type: dict, OrderedDict, Counter, defaultdict of such a type, list, tuple, set, frozenset, torch.Size, str, int,
float, complex, bool, None, bytes, bytearray, torch.dtype, device, layout and qscheme, torch.Tensor or Parameter (dense,
sparse, nested, quantized or on the meta device), torch's storages, and NumPy's arrays and scalars that hold no Python
objects. What comes back:

- Tensors are contiguous, on the CPU unless asked otherwise, leaves of autograd, without Python attributes.
- One tensor object used twice is one object again; two objects that are the same view (storage, offset, shape, stride)
  share memory again; views that overlap in any other way are separate copies.
- A container used twice comes back as two equal containers.

In `.safetensors`, tensors lie under their dotted key path, a tied one once, under its first; the rest of the value is
JSON in the header's metadata, under `runner.structure`, or in a uint8 tensor of that name when it is large.
"""

import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from runner.utils.files import EagerFile, UnreadableError, atomic_path, check_regular, disk, open_regular, read_bounded
from runner.utils.files.strict_json import MAX_DEPTH, parse_json
from runner.utils.serialization import (
    SFT_DTYPES,
    STRUCTURE,
    FlattenedState,
    HostSnapshot,
    compact,
    restore_raw,
    text_of,
    unpack,
    where,
)
from runner.utils.serialization.pt_file import check_archive, check_value

__all__ = [
    "HostSnapshot",
    "check_json",
    "load",
    "read_json",
    "read_metadata",
    "save",
    "write_json",
    "write_new",
    "write_new_json",
]

_PT, _SFT = (".pt", ".pth"), (".sft", ".safetensors")
_OURS = "runner.keys"  # names, within a header's metadata, the keys that the user did not give
_PT_METADATA = "archive/metadata.json"
_MAX_HEADER_BYTES = 100_000_000  # the limit that safetensors readers set, and ours of a JSON file
_MAX_INLINE_BYTES = 16_000_000
_MAX_STRUCTURE_DEPTH = 4 * MAX_DEPTH + 20  # a container is a list in a list in a list in an object at most
_MAX_JSON_DIGITS = 4300  # of an integer: Python reads no longer ones


def save(value: Any, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Stores `value` at `path`, as `.pt`/`.pth` or `.sft`/`.safetensors`, whole or not at all, in a folder that exists.

    A `Snapshot` is stored as the value that it is of.
    `metadata`, string to string, lies beside the value; `read_metadata` gives it back.

    Raises:
        TypeError: something in `value` cannot be stored; the message names its key path. Nothing was written.
        ValueError: unknown suffix, a container that holds itself, a header over 100 MB. Nothing was written.
    """
    write = _writer(value, Path(path), metadata)
    with atomic_path(path) as temporary, disk.create(temporary, "w+b") as stream:
        write(stream)


def write_new(value: Any, path: str | os.PathLike[str]) -> None:
    """Stores `value` at `path` as `save` does, but neither atomic nor flushed: for a folder that nobody reads yet."""
    write = _writer(value, Path(path), None)
    with disk.create(Path(path), "x+b") as stream:
        write(cast(BinaryIO, EagerFile(stream)))


def _writer(value: Any, path: Path, metadata: Mapping[str, str] | None) -> Callable[[BinaryIO], None]:
    is_pt = _suffix(path) in _PT
    metadata = _checked_metadata(metadata or {})
    packed = value if isinstance(value, FlattenedState) else FlattenedState(value)
    return _pt_writer(packed, metadata) if is_pt else _sft_writer(packed, metadata, path)


def load(path: str | os.PathLike[str], *, allow_pickle: bool = False, map_location: str | torch.device = "cpu") -> Any:
    """Gives the value stored at `path`, equal in type and value, its tensors on `map_location`.

    A safetensors file of another program is a flat dict of tensors. The tensors of a safetensors file are mapped from
    it privately: writing to one does not change the file, and replacing or deleting the file does not change them.
    A `.pt` file is read without executing anything, unless `allow_pickle=True` says that this file may run its code.

    Raises:
        ValueError: unknown suffix, a file that is broken or not of its format, a pickle that needs `allow_pickle`.
    """
    path = Path(path)
    if _suffix(path) in _PT:
        return _load_pt(path, allow_pickle, map_location)
    with _open_sft(path) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name).to(map_location) for name in file.keys()}  # noqa: SIM118
    if STRUCTURE not in metadata:
        return tensors
    with _complaint(path, f"its {STRUCTURE!r} does not fit its tensors"):
        text = metadata[STRUCTURE] or tensors.pop(STRUCTURE).cpu().numpy().tobytes()
        document = parse_json(text, _MAX_STRUCTURE_DEPTH)
        restore_raw(document, tensors)
        return unpack(document, tensors)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Gives the metadata that `save` was given for the file at `path`, or that another program left in its header.

    Raises:
        ValueError: unknown suffix, or a file that is broken or not of its format.
    """
    path = Path(path)
    if _suffix(path) in _SFT:
        with _open_sft(path) as file:
            metadata: dict[str, str] = file.metadata() or {}
        return {key: text for key, text in metadata.items() if key not in metadata.get(_OURS, "").split()}
    with _complaint(path, "not a whole .pt file"), open_regular(path, follows_link=True) as stream:
        check_archive(stream)
        archive = zipfile.ZipFile(stream)
        if _PT_METADATA not in archive.namelist():
            return {}
        if archive.getinfo(_PT_METADATA).file_size > _MAX_HEADER_BYTES:
            raise ValueError(f"metadata of over {_MAX_HEADER_BYTES:,} bytes")
        return _checked_metadata(parse_json(archive.read(_PT_METADATA)))


def _suffix(path: Path) -> str:
    if path.suffix not in (*_PT, *_SFT):
        raise ValueError(f"{path}: its suffix is {path.suffix!r}; use one of {', '.join((*_PT, *_SFT))}")
    return path.suffix


def _checked_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    for key, text in metadata.items():
        if type(key) is not str or type(text) is not str:
            raise TypeError(f"metadata maps strings to strings, not {key!r} to {text!r}")
        (key + text).encode()  # a lone surrogate is a ValueError
        if key in (STRUCTURE, _OURS):
            raise ValueError(f"metadata has the key {key!r}, which the file itself uses; name it otherwise")
    return dict(metadata)


def _pt_writer(packed: FlattenedState, metadata: Mapping[str, str]) -> Callable[[BinaryIO], None]:
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in packed.tensors.items():
        packed.wait_for(name)
        plain = compact(tensor)  # and apart from another view of the same storage, which would be tied to it
        tensors[name] = plain.clone() if plain.untyped_storage().data_ptr() in storages else plain
        storages.add(plain.untyped_storage().data_ptr())
    stored = unpack(packed.document, tensors) if packed.is_picklable else None
    if not packed.is_picklable:
        stored = {STRUCTURE: json.dumps(packed.document), "tensors": tensors}

    def write(stream: BinaryIO) -> None:
        try:
            torch.save(stored, stream)
        except RuntimeError as error:
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        if metadata:
            with zipfile.ZipFile(stream, "a") as archive:
                archive.writestr(_PT_METADATA, json.dumps(metadata))

    return write


def _sft_writer(packed: FlattenedState, metadata: Mapping[str, str], path: Path) -> Callable[[BinaryIO], None]:
    tensors = {name: _as_bytes_of_dtype(tensor) for name, tensor in packed.tensors.items()}
    structure = json.dumps(packed.document)
    if len(structure) > _MAX_INLINE_BYTES:
        tensors[STRUCTURE] = torch.frombuffer(bytearray(structure.encode()), dtype=torch.uint8)
        structure = ""
    own = {STRUCTURE: structure} | ({} if "format" in metadata else {"format": "pt"})
    header: dict[str, Any] = {"__metadata__": dict(metadata) | own | {_OURS: " ".join([*own, _OURS])}}
    ordered = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)  # keeps every tensor aligned
    end = 0
    for name in ordered:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": SFT_DTYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
    encoded = json.dumps(header, ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > _MAX_HEADER_BYTES:
        found = f"its header is {len(encoded):,} bytes, readers take {_MAX_HEADER_BYTES:,}"
        raise ValueError(f"{path}: {found}: save it as .pt")

    def write(stream: BinaryIO) -> None:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in ordered:
            packed.wait_for(name)
            if tensors[name].numel():
                stream.write(tensors[name].cpu().reshape(-1).view(torch.uint8).numpy().data)

    return write


def _as_bytes_of_dtype(tensor: Tensor) -> Tensor:
    """Returns the tensor contiguous, as flat bytes where the format lacks its dtype."""
    plain = compact(tensor)
    return plain if plain.dtype in SFT_DTYPES else plain.reshape(-1).view(torch.uint8)


def _load_pt(path: Path, allow_pickle: bool, map_location: str | torch.device) -> Any:
    try:
        with open_regular(path, follows_link=True) as stream:
            size = os.fstat(stream.fileno()).st_size
            if not allow_pickle:
                check_archive(stream)
        value = torch.load(path, map_location=map_location, weights_only=not allow_pickle)
        if not allow_pickle:
            check_value(value, size)
    except (FileNotFoundError, UnreadableError):
        raise
    except Exception as error:
        remedy = "" if allow_pickle else "; if you trust where it comes from to run code here, pass allow_pickle=True"
        raise ValueError(f"{path}: not read, {_first_line(error)}{remedy}") from error
    if type(value) is not dict or value.keys() != {STRUCTURE, "tensors"}:
        return value
    with _complaint(path, f"its {STRUCTURE!r} does not fit its tensors"):
        return unpack(parse_json(value[STRUCTURE], _MAX_STRUCTURE_DEPTH), value["tensors"])


@contextmanager
def _open_sft(path: Path) -> Iterator[Any]:
    check_regular(path, follows_link=True)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file, {_first_line(error)}") from error


@contextmanager
def _complaint(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: {what}, {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def write_json(value: Any, path: str | os.PathLike[str], indent: int | None = 2) -> None:
    """Stores plain values as JSON, whole or not at all: floats exact, NaN and infinities as Python writes them.

    Args:
        indent: blanks a level; None is compact.
    Raises:
        TypeError: something JSON would change, such as a tuple or a key that is no string; named by its key path.
        ValueError: a container that holds itself, or an integer that Python would not read back.
    """
    encoded = _encode_json(value, indent)
    with atomic_path(path) as temporary, disk.create(temporary, "wb") as stream:
        stream.write(encoded)


def write_new_json(value: Any, path: str | os.PathLike[str], indent: int | None = 2) -> None:
    """Stores plain values as `write_json` does, but neither atomic nor flushed: for a folder that nobody reads yet."""
    encoded = _encode_json(value, indent)
    with disk.create(Path(path), "wb") as stream:
        stream.write(encoded)


def _encode_json(value: Any, indent: int | None) -> bytes:
    check_json(value)
    separators = (",", ":") if indent is None else None
    text = json.dumps(value, indent=indent, ensure_ascii=False, separators=separators) + "\n"
    try:
        encoded = text.encode()
    except UnicodeEncodeError:  # lone surrogates
        encoded = (json.dumps(value, indent=indent, separators=separators) + "\n").encode()
    if len(encoded) > _MAX_HEADER_BYTES:
        raise ValueError(f"as JSON it has {len(encoded):,} bytes, {_MAX_HEADER_BYTES:,} are read back")
    return encoded


def check_json(value: Any) -> None:
    """Raises what `write_json` would of a value that JSON can't hold."""
    _check_json(value, (), set())


def _check_json(value: Any, path: tuple[Any, ...], above: set[int]) -> None:
    kind = type(value)
    if kind is int and abs(value) >= 10**_MAX_JSON_DIGITS:
        raise ValueError(f"{where(path)} is an integer of over {_MAX_JSON_DIGITS} digits, which is not read back")
    if value is None or kind in (bool, int, float, str):
        return
    if kind not in (dict, list):
        raise TypeError(f"{where(path)} is a {kind.__module__}.{kind.__qualname__}, which JSON does not have")
    if id(value) in above:
        raise ValueError(f"{where(path)}, a {kind.__name__}, holds itself, which JSON does not have")
    if len(path) >= MAX_DEPTH:
        raise ValueError(f"{where(path[:3])} is nested over {MAX_DEPTH} deep, which is not read back")
    above.add(id(value))
    for key, item in value.items() if kind is dict else enumerate(value):
        if kind is dict and type(key) is not str:
            raise TypeError(f"{where(path)} has the key {text_of(key)}; JSON keys are strings")
        _check_json(item, (*path, key), above)
    above.remove(id(value))


def read_json(path: str | os.PathLike[str]) -> Any:
    """Gives the value of a JSON file of at most 100 MB.

    Raises:
        ValueError: not JSON, with line and column, a key twice in one object, or nested too deeply.
        OSError: no regular file, larger, or the disk refuses.
    """
    content = read_bounded(path, _MAX_HEADER_BYTES)
    try:
        return parse_json(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: not JSON, {error.msg}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not read as JSON, {_first_line(error)}") from error
