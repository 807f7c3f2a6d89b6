"""Saves and loads nested plain values and tensors as `.pt` or `.safetensors`, and JSON; every write is atomic.

Both tensor formats use the same flattening of the value, so they accept and return the same. The accepted types are,
without subclasses: dict, OrderedDict, Counter, defaultdict of such a type, list, tuple, set, frozenset, torch.Size,
str, int, float, complex, bool, None, bytes, bytearray, torch.dtype, device, layout and qscheme, torch.Tensor or
Parameter (dense, sparse, nested, quantized or on the meta device), torch's storages, and NumPy's arrays and scalars
without Python objects. The loaded value differs in this:

- Tensors are contiguous, on the CPU unless `map_location` says otherwise, autograd leaves, without Python attributes.
- A tensor object used twice is one object again. Two objects of the same view (storage, offset, shape, stride) share
  memory again. Views that overlap in any other way become separate copies.
- A container used twice becomes two equal containers.

In `.safetensors`, a tensor is stored under its dotted key path, a tied one once, under its first path, unless
`repeats_ties` is set. The rest of the value is JSON in the header's metadata, under `runner.structure`, or in a uint8
tensor of that name if it is large.
"""

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from runner.utils.files import (
    UnreadableError,
    WritebackFile,
    atomic_path,
    check_regular,
    disk,
    open_regular,
    read_bounded,
)
from runner.utils.files.strict_json import MAX_DEPTH, parse_json
from runner.utils.serialization import (
    SFT_DTYPES,
    STRUCTURE,
    FlattenedState,
    HostSnapshot,
    describe_stored,
    encode_sft_header,
    format_key,
    format_path,
    join_sft_header,
    restore_dtypes,
    to_contiguous,
    unflatten,
)
from runner.utils.serialization.pt_file import check_archive, check_value

__all__ = [
    "HostSnapshot",
    "check_json",
    "load",
    "load_pickle",
    "read_json",
    "read_metadata",
    "save",
    "write_json",
    "write_new",
    "write_new_json",
]

_PT, _SFT = (".pt", ".pth"), (".sft", ".safetensors")
_OWN_KEYS = "runner.keys"  # the metadata key that lists the keys which the user did not pass
_PT_METADATA = "archive/metadata.json"
_MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors readers, used for JSON files too
_MAX_INLINE_BYTES = 16_000_000
_WRITTEN_BYTES = 8 << 20  # at once, so that the kernel can begin to write them to disk
_SAVE_AS_PT = ": save it as .pt"
_MAX_STRUCTURE_DEPTH = 4 * MAX_DEPTH + 20  # a container becomes at most a list in a list in a list in an object
_MAX_JSON_DIGITS = 4300  # digits of an integer: the limit of Python's parser


def save(
    value: Any,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    repeats_ties: bool = False,
) -> None:
    """Saves a value atomically as `.pt`, `.pth`, `.sft` or `.safetensors`, in an existing folder.

    Args:
        value: nested plain values and tensors, or a `HostSnapshot` of them.
        metadata: strings by name, stored beside the value; `read_metadata` returns them.
        repeats_ties: stores a tied tensor of a flat dict under each of its names in a `.safetensors` file, for programs
            that expect every name. `load` ties them again.
    Raises:
        TypeError: a part of the value cannot be stored; the message has its key path. Nothing was written.
        ValueError: unknown suffix, a container that contains itself, or a header over 100 MB. Nothing was written.
    """
    write = _writer(value, Path(path), metadata, repeats_ties)
    with atomic_path(path) as temporary, disk.create(temporary, "w+b") as stream:
        write(stream)


def write_new(value: Any, path: str | os.PathLike[str]) -> None:
    """Saves a value like `save`, but neither atomically nor flushed, for a folder that has no reader yet."""
    write = _writer(value, Path(path), None)
    with disk.create(Path(path), "x+b") as stream:
        write(cast(BinaryIO, WritebackFile(stream)))


def _writer(
    value: Any, path: Path, metadata: Mapping[str, str] | None, repeats_ties: bool = False
) -> Callable[[BinaryIO], None]:
    is_pt = _checked_suffix(path) in _PT
    metadata = _checked_metadata(metadata or {})
    state = value if isinstance(value, FlattenedState) else FlattenedState(value)
    if is_pt:
        return _pt_writer(state, metadata)
    return _sft_writer(state, metadata, path, state.find_ties(value) if repeats_ties else {})


def load(path: str | os.PathLike[str], *, allow_pickle: bool = False, map_location: str | torch.device = "cpu") -> Any:
    """Loads the value saved at `path`, equal in type and content.

    A safetensors file of another program gives a flat dict of tensors. Tensors of a safetensors file are mapped
    privately: writing to one does not change the file, and replacing or deleting the file does not change them.

    Args:
        allow_pickle: lets a `.pt` file execute its code. Without it, loading executes nothing.
        map_location: device of the tensors.
    Raises:
        ValueError: unknown suffix, a broken file or one of another format, or a pickle that needs `allow_pickle`.
        OSError: the file does not exist, is no regular file, or the disk refuses.
    """
    path = Path(path)
    if _checked_suffix(path) in _PT:
        return _load_pt(path, allow_pickle, map_location)
    with _open_sft(path) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name).to(map_location) for name in file.keys()}  # noqa: SIM118
    if STRUCTURE not in metadata:
        return tensors
    with _as_value_error(path, f"its {STRUCTURE!r} does not fit its tensors"):
        text = metadata[STRUCTURE] or tensors.pop(STRUCTURE).cpu().numpy().tobytes()
        document = parse_json(text, _MAX_STRUCTURE_DEPTH)
        for name in document.get("ties", ()) if isinstance(document, dict) else ():
            del tensors[name]
        restore_dtypes(document, tensors)
        return unflatten(document, tensors)


def load_pickle(path: str | os.PathLike[str]) -> Any:
    """Loads a file that `torch.save` wrote, of any suffix; executes nothing.

    Raises:
        ValueError: a broken file or one of another format, or a pickle that would execute code.
        OSError: the file does not exist, is no regular file, or the disk refuses.
    """
    return _load_pt(Path(path), False, "cpu", remedy="")


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Returns the metadata passed to `save`, or the metadata in the header of another program's file.

    Raises:
        ValueError: unknown suffix, or a broken file or one of another format.
        OSError: the file does not exist, is no regular file, or the disk refuses.
    """
    path = Path(path)
    if _checked_suffix(path) in _SFT:
        with _open_sft(path) as file:
            metadata: dict[str, str] = file.metadata() or {}
        return {key: text for key, text in metadata.items() if key not in metadata.get(_OWN_KEYS, "").split()}
    with _as_value_error(path, "not a whole .pt file"), open_regular(path, follows_link=True) as stream:
        check_archive(stream)
        archive = zipfile.ZipFile(stream)
        if _PT_METADATA not in archive.namelist():
            return {}
        if archive.getinfo(_PT_METADATA).file_size > _MAX_HEADER_BYTES:
            raise ValueError(f"metadata of over {_MAX_HEADER_BYTES:,} bytes")
        return _checked_metadata(parse_json(archive.read(_PT_METADATA)))


def _checked_suffix(path: Path) -> str:
    if path.suffix not in (*_PT, *_SFT):
        raise ValueError(f"{path}: its suffix is {path.suffix!r}; use one of {', '.join((*_PT, *_SFT))}")
    return path.suffix


def _checked_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    for key, text in metadata.items():
        if type(key) is not str or type(text) is not str:
            raise TypeError(f"metadata maps strings to strings, not {key!r} to {text!r}")
        (key + text).encode()  # raises a ValueError for a lone surrogate
        if key in (STRUCTURE, _OWN_KEYS):
            raise ValueError(f"metadata has the key {key!r}, which the file itself uses; name it otherwise")
    return dict(metadata)


def _pt_writer(state: FlattenedState, metadata: Mapping[str, str]) -> Callable[[BinaryIO], None]:
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name in state.tensors:
        plain = state.stored_tensor(name)  # torch.save ties tensors that share a storage: a second one is cloned
        tensors[name] = plain.clone() if plain.untyped_storage().data_ptr() in storages else plain
        storages.add(plain.untyped_storage().data_ptr())
    stored = (
        unflatten(state.document, tensors)
        if state.is_picklable
        else {STRUCTURE: json.dumps(state.document), "tensors": tensors}
    )

    def write(stream: BinaryIO) -> None:
        try:
            torch.save(stored, stream)
        except RuntimeError as error:
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        if metadata:
            with zipfile.ZipFile(stream, "a") as archive:
                archive.writestr(_PT_METADATA, json.dumps(metadata))

    return write


def _sft_writer(
    state: FlattenedState, metadata: Mapping[str, str], path: Path, ties: Mapping[str, str]
) -> Callable[[BinaryIO], None]:
    """Returns a function that writes a SafeTensors file.

    Args:
        ties: further names of tensors, with the names under which `state` has them.
    """
    structure = json.dumps(state.document | ({"ties": dict(ties)} if ties else {}))
    if isinstance(state, HostSnapshot) and len(structure) <= _MAX_INLINE_BYTES:
        return _snapshot_writer(state, _with_structure(metadata, structure), path)
    described = {name: describe_stored(tensor) for name, tensor in state.tensors.items()}
    described |= {name: described[stored_name] for name, stored_name in ties.items()}
    added: dict[str, Tensor] = {}
    if len(structure) > _MAX_INLINE_BYTES:
        added[STRUCTURE] = torch.frombuffer(bytearray(structure.encode()), dtype=torch.uint8)
        described[STRUCTURE] = describe_stored(added[STRUCTURE])
        structure = ""
    header, ordered = encode_sft_header(path, described, _with_structure(metadata, structure), _SAVE_AS_PT)

    def write(stream: BinaryIO) -> None:
        stream.write(header)
        for name in ordered:
            # Only here: the tensors of a snapshot have their contents once they are copied.
            tensor = added[name] if name in added else state.stored_tensor(ties.get(name, name))
            if tensor.numel():
                stream.write(_as_bytes_of_dtype(tensor).cpu().reshape(-1).view(torch.uint8).numpy().data)

    return write


def _snapshot_writer(snapshot: HostSnapshot, metadata: Mapping[str, str], path: Path) -> Callable[[BinaryIO], None]:
    """Returns a function that writes a SafeTensors file from the memory of a snapshot, which has its order."""
    header = join_sft_header(path, snapshot.sft_entries(), metadata, _SAVE_AS_PT)

    def write(stream: BinaryIO) -> None:
        stream.write(header)
        for content in snapshot.contents():
            for piece in content.split(_WRITTEN_BYTES):
                stream.write(piece.numpy().data)

    return write


def _with_structure(metadata: Mapping[str, str], structure: str) -> dict[str, str]:
    """Returns the metadata of a SafeTensors file, with the keys that the file itself uses."""
    added = {STRUCTURE: structure} | ({} if "format" in metadata else {"format": "pt"})
    return dict(metadata) | added | {_OWN_KEYS: " ".join([*added, _OWN_KEYS])}


def _as_bytes_of_dtype(tensor: Tensor) -> Tensor:
    """Returns the tensor, contiguous; as flat bytes [num_bytes] if the format lacks its dtype."""
    plain = to_contiguous(tensor)
    return plain if plain.dtype in SFT_DTYPES else plain.reshape(-1).view(torch.uint8)


_REMEDY = "; if you trust where it comes from to run code here, pass allow_pickle=True"


def _load_pt(path: Path, allow_pickle: bool, map_location: str | torch.device, remedy: str = _REMEDY) -> Any:
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
        raise ValueError(f"{path}: not read, {_first_line(error)}{'' if allow_pickle else remedy}") from error
    if type(value) is not dict or value.keys() != {STRUCTURE, "tensors"}:
        return value
    with _as_value_error(path, f"its {STRUCTURE!r} does not fit its tensors"):
        return unflatten(parse_json(value[STRUCTURE], _MAX_STRUCTURE_DEPTH), value["tensors"])


@contextmanager
def _open_sft(path: Path) -> Iterator[Any]:
    check_regular(path, follows_link=True)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file, {_first_line(error)}") from error


@contextmanager
def _as_value_error(path: Path, what: str) -> Iterator[None]:
    """Raises any error of the block except OSError as a ValueError with the path."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: {what}, {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def write_json(value: Any, path: str | os.PathLike[str], indent: int | None = 2) -> None:
    """Saves plain values atomically as JSON: floats exactly, NaN and infinities as Python writes them.

    Args:
        indent: spaces per level; None for compact JSON.
    Raises:
        TypeError: a value that JSON would change, such as a tuple or a key that is no string, with its key path.
        ValueError: a container that contains itself, or an integer that Python would not read back.
    """
    encoded = _encode_json(value, indent)
    with atomic_path(path) as temporary, disk.create(temporary, "wb") as stream:
        stream.write(encoded)


def write_new_json(value: Any, path: str | os.PathLike[str], indent: int | None = 2) -> None:
    """Saves plain values like `write_json`, but neither atomically nor flushed, for a folder that has no reader yet."""
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
    """Raises the errors of `write_json` for a value that JSON can't represent, without writing."""
    _check_json(value, (), set())


def _check_json(value: Any, path: tuple[Any, ...], ancestors: set[int]) -> None:
    kind = type(value)
    if kind is int and abs(value) >= 10**_MAX_JSON_DIGITS:
        raise ValueError(f"{format_path(path)} is an integer of over {_MAX_JSON_DIGITS} digits, which is not read back")
    if value is None or kind in (bool, int, float, str):
        return
    if kind not in (dict, list):
        raise TypeError(f"{format_path(path)} is a {kind.__module__}.{kind.__qualname__}, which JSON does not have")
    if id(value) in ancestors:
        raise ValueError(f"{format_path(path)}, a {kind.__name__}, holds itself, which JSON does not have")
    if len(path) >= MAX_DEPTH:
        raise ValueError(f"{format_path(path[:3])} is nested over {MAX_DEPTH} deep, which is not read back")
    ancestors.add(id(value))
    for key, item in value.items() if kind is dict else enumerate(value):
        if kind is dict and type(key) is not str:
            raise TypeError(f"{format_path(path)} has the key {format_key(key)}; JSON keys are strings")
        _check_json(item, (*path, key), ancestors)
    ancestors.remove(id(value))


def read_json(path: str | os.PathLike[str]) -> Any:
    """Returns the value of a JSON file of at most 100 MB.

    Raises:
        ValueError: the file is not JSON (with line and column), has a key twice in one object, or is nested too deeply.
        OSError: it is no regular file or larger, or the disk refuses.
    """
    content = read_bounded(path, _MAX_HEADER_BYTES)
    try:
        return parse_json(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: not JSON, {error.msg}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not read as JSON, {_first_line(error)}") from error
