"""Signs a run's config with a key of this user (HMAC), to distinguish the user's own runs from those of others.

A signed config may name anything, like the YAML that it was composed of; an unsigned one is untrusted. The signature
covers the files of `.hydra/`, the run's location, the directories that its modules and configs come from, and the links
that lead out of its folder to the user's storage.

Source: Jupyter's signed notebooks,
https://jupyter-server.readthedocs.io/en/latest/operators/security.html#security-in-notebook-documents
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from runner.config.errors import ConfigError
from runner.config.trust import import_path
from runner.utils.files import disk, make_folder_below, make_folders, read_bounded, replace_file

NAME = "signature.json"
_SIGNED = ("config.yaml", "overrides.yaml", "hydra.yaml", "weights.json")  # of .hydra/
_MARK = ".run"  # a file in checkpoints/ with the path of their run
_KEY_BYTES = 32
_MAX_BYTES = 1 << 20
# Digests of signed files, by their `.hydra/` and name: a file that is read later must be the one that was checked.
_checked: dict[str, Mapping[str, list[str]]] = {}


class SignatureError(ValueError):
    """A config isn't known to be this user's own, with the reason."""


@dataclass(frozen=True)
class Origin:
    """The origin of a run: the directories that it was started in and imports from.

    Args:
        directory: its working directory.
        config_dirs: directories of YAML beside the runner's own.
        python_path: directories that modules are imported from, beside the interpreter's own.
        links: targets of the links of the run's folder, by their names.
        run_id: stays the same when the run's folder is moved.
    """

    directory: str
    config_dirs: list[str] = field(default_factory=list)
    python_path: list[str] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)
    run_id: str = field(default_factory=lambda: secrets.token_hex(16))


def _origin_in(content: Mapping[str, Any]) -> Origin:
    return Origin(**{each.name: content[each.name] for each in fields(Origin)})


def find_origin(config_dirs: Sequence[str]) -> Origin:
    """Returns the origin of a run that is started now."""
    return Origin(os.getcwd(), [os.path.abspath(path) for path in config_dirs], import_path.list_own())


def sign(run: Path, origin: Origin, files: Mapping[str, bytes], *, trusts_present: bool = False) -> None:
    """Signs the config that is about to be written to a run's folder; the signed config that is there stays valid.

    Args:
        files: the contents of files of `.hydra/` by name; other files there are kept.
        trusts_present: the user says that the kept files are theirs.
    Raises:
        OSError: the key can't be read or created, or the signature can't be written.
        SignatureError: a kept file isn't known to be this user's own.
    """
    present = _read_digests(run)
    kept = [name for name in present if name not in files]
    is_signed = False
    with contextlib.suppress(SignatureError):
        _check_digests(_read(run), present)
        is_signed = True
    if kept and not (is_signed or trusts_present):
        raise SignatureError(f".hydra/{kept[0]} was modified after it was signed")
    digests = {name: [_digest(content)] for name, content in files.items()}
    for name in present:
        # A crash between two of the files leaves an old one beside a new one: both are valid.
        if is_signed or name in kept:
            digests[name] = [*digests.get(name, ()), *present[name]]
    content = {"run": str(run.absolute()), "digests": digests, **asdict(origin)}
    sealed = _seal(content, make=True)
    make_folder_below(run / ".hydra", run)
    replace_file(run / ".hydra" / NAME, [json.dumps(sealed, indent=1).encode()])
    _checked[os.path.realpath(run / ".hydra")] = digests


def mark_checkpoints(run: Path) -> None:
    """Marks the checkpoints of a signed run as its own, so that a link to them is followed when they were moved."""
    with contextlib.suppress(SignatureError, OSError):
        content = {"checkpoints_of": str(run.absolute()), "run_id": check_signature(run).run_id}
        if _read_mark(run / "checkpoints") != content:
            replace_file(run / "checkpoints" / _MARK, [json.dumps(_seal(content)).encode()])


def find_marked_run(checkpoints: Path) -> Path | None:
    """Returns the run of a folder of checkpoints that this user has marked and the run has a link to."""
    content = _read_mark(checkpoints)
    if content is None or not _is_same_folder(Path(content["checkpoints_of"], "checkpoints"), checkpoints):
        return None
    return Path(content["checkpoints_of"])


def check_signature(run: Path) -> Origin:
    """Returns the origin of a run whose config this user has signed.

    Raises:
        SignatureError: the config is another user's, or was modified or moved after it was signed.
    """
    folder = os.path.realpath(run / ".hydra")
    _checked.pop(folder, None)
    content = _read(run)
    origin = _origin_in(content)
    _check_digests(content, _read_digests(run))
    if not _is_same_folder(Path(content["run"]), run):
        raise SignatureError(f"it was signed in {content['run']}, and lies elsewhere now")
    if not os.path.isdir(origin.directory):
        raise SignatureError(f"it was started in {origin.directory}, which is gone")
    _checked[folder] = content["digests"]
    return replace(origin, links=origin.links | _find_moved_checkpoints(run, origin))


def find_signed(run: Path) -> Origin | None:
    """Returns the origin of the run in a folder; None if this user has not signed it."""
    try:
        return check_signature(run)
    except SignatureError:
        return None


def identify(run: Path, sign_option: str = "", config_dirs: Sequence[str] = ()) -> tuple[Origin | None, str]:
    """Returns the origin of a run, its modules importable from now on; or None and why the run is untrusted.

    Args:
        sign_option: the option by which the user says that the run is theirs, which signs it; empty without it.
        config_dirs: directories of YAML of this command line.
    Raises:
        ConfigError: the run can't be signed.
    """
    try:
        origin = sign_present(run, config_dirs) if sign_option else check_signature(run)
    except SignatureError as error:
        if sign_option:
            raise ConfigError(f"{sign_option}: {run}: {error}") from error
        return None, str(error)
    import_path.prepend(origin.python_path)
    return origin, ""


def is_as_checked(path: Path, content: bytes) -> bool:
    """Returns whether a file that was just read is the one whose signature was checked, if it was."""
    digests = _checked.get(os.path.realpath(path.parent))
    return digests is None or _digest(content) in digests.get(path.name, ())


def _check_digests(content: Mapping[str, Any], present: Mapping[str, list[str]]) -> None:
    for name in _SIGNED:
        if not set(present.get(name, [None])) <= set(content["digests"].get(name) or [None]):
            raise SignatureError(f".hydra/{name} was modified after it was signed")


def sign_present(run: Path, config_dirs: Sequence[str] = ()) -> Origin:
    """Signs the present config and links of a run, because the user says that the run is theirs.

    A recorded directory that is gone is looked for where it would be if it was moved with the run's folder, and below
    the current one.

    Raises:
        SignatureError: it can't be signed.
    """
    origin = find_origin(config_dirs)
    with contextlib.suppress(SignatureError):
        content = _read(run)
        before = _origin_in(content)
        moves = [*_find_moves(Path(content["run"]), run.absolute()), (before.directory, origin.directory)]
        relocate = partial(_relocate, moves)
        origin = replace(
            origin,
            directory=relocate(before.directory),
            config_dirs=list(dict.fromkeys([*origin.config_dirs, *map(relocate, before.config_dirs)])),
            python_path=list(dict.fromkeys([*origin.python_path, *map(relocate, before.python_path)])),
            run_id=before.run_id,
        )
    links = {path.name: os.path.realpath(path) for path in run.iterdir() if path.is_symlink() and path.is_dir()}
    origin = replace(origin, links=links)
    try:
        with disk.confine(run):
            sign(run, origin, {}, trusts_present=True)
    except OSError as error:
        raise SignatureError(f"it can't be signed: {error}") from error
    return origin


def describe_links(origin: Origin) -> list[str]:
    """Returns a message for each link that was signed."""
    return [f"{name}: a link; the run writes to {target}" for name, target in origin.links.items()]


def _find_moves(old: Path, new: Path) -> Iterator[tuple[str, str]]:
    """Yields a run's folder and the parents that moved: if `a/b/run` is `c/b/run` now, `a/b` is `c/b`, and `a` `c`."""
    yield str(old), str(new)
    while old.name and old.name == new.name:
        old, new = old.parent, new.parent
        yield str(old), str(new)


def _relocate(moves: Sequence[tuple[str, str]], directory: str) -> str:
    """Returns a directory's path after moves of folders; the same path if it exists, or is not found."""
    if os.path.isdir(directory):
        return directory
    for old, new in moves:
        relative = os.path.relpath(directory, old)
        moved = os.path.normpath(os.path.join(new, relative))
        if not relative.startswith("..") and os.path.isdir(moved):
            return moved
    return directory


def sign_text(text: str, origin: Origin) -> str:
    """Returns a signature of a text, such as an exported config, with its origin.

    Raises:
        OSError: the key can't be read.
    """
    content = {"text": _digest(text.encode()), **asdict(replace(origin, links={}))}
    return json.dumps(_seal(content))


def check_text(text: str, signature: str | None) -> Origin:
    """Returns the origin of a text that this user has signed.

    Raises:
        SignatureError: nobody has signed it, or another user.
    """
    content = _parse(signature, "text", str)
    if content["text"] != _digest(text.encode()):
        raise SignatureError("its config was modified after it was signed")
    return _origin_in(content)


def _find_moved_checkpoints(run: Path, origin: Origin) -> dict[str, str]:
    """Returns the link to the run's own checkpoints if they were moved to another disk after they were marked."""
    folder = run / "checkpoints"
    if not folder.is_symlink() or "checkpoints" in origin.links:
        return {}
    content = _read_mark(folder)
    is_own = content is not None and content["run_id"] == origin.run_id
    return {"checkpoints": os.path.realpath(folder)} if is_own else {}


def _read_mark(checkpoints: Path) -> dict[str, Any] | None:
    """Returns the content of the mark in a folder of checkpoints; None without one of this user's."""
    try:
        content = _verify(read_bounded(checkpoints / _MARK, _MAX_BYTES).decode())
    except (OSError, UnicodeDecodeError, SignatureError):
        return None
    return content if "checkpoints_of" in content else None


def _is_same_folder(recorded: str | Path, found: str | Path) -> bool:
    try:
        return os.path.samefile(recorded, found)
    except OSError:
        return False


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read_digests(run: Path) -> dict[str, list[str]]:
    digests = {}
    for name in _SIGNED:
        path = run / ".hydra" / name
        try:
            digests[name] = [_digest(read_bounded(path, _MAX_BYTES))]
        except FileNotFoundError:
            continue
        except OSError as error:
            raise SignatureError(f".hydra/{name} can't be read ({error})") from error
    return digests


def _read(run: Path) -> dict[str, Any]:
    """Returns the content of a run's signature.

    Raises:
        SignatureError: it is missing, damaged, or another user's.
    """
    try:
        text = read_bounded(run / ".hydra" / NAME, _MAX_BYTES).decode()
    except FileNotFoundError:
        raise SignatureError("nobody has signed it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SignatureError(f".hydra/{NAME} can't be read ({error})") from error
    content = _parse(text, "run", str)
    digests = content.get("digests")
    if not isinstance(digests, dict):
        raise SignatureError(f".hydra/{NAME} is damaged")
    return content


def _parse(text: str | None, key: str, kind: type) -> dict[str, Any]:
    """Returns the content of a signature, once its code and its keys are checked."""
    if text is None:
        raise SignatureError("nobody has signed it")
    content = _verify(text)
    wanted = {key, *(each.name for each in fields(Origin))}
    if not wanted <= content.keys() or not isinstance(content[key], kind):
        raise SignatureError("another version of the runner has signed it")
    return content


def _verify(text: str) -> dict[str, Any]:
    """Returns the content that `_seal` got.

    Raises:
        SignatureError: it is damaged, or was sealed with another key.
    """
    try:
        content = json.loads(text)
        code = content.pop("hmac")
        expected = _authenticate(content, _read_key())
        is_right = isinstance(code, str) and hmac.compare_digest(code.encode(), expected.encode())
    except FileNotFoundError:
        raise SignatureError("it was signed by another user, or on another machine") from None
    except OSError as error:
        raise SignatureError(f"the key can't be read: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SignatureError("its signature is damaged") from error
    if not is_right:
        raise SignatureError(
            "another user has signed it, or this one on another machine; or its signature was modified"
        )
    return dict(content)


def _seal(content: Mapping[str, Any], *, make: bool = False) -> dict[str, Any]:
    """Returns a content with its authentication code by the user's key; `make` creates a key that is missing."""
    return {**content, "hmac": _authenticate(content, _read_key(make=make))}


def _authenticate(content: Mapping[str, Any], key: bytes) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _key_path() -> Path:
    state = os.environ.get("XDG_STATE_HOME", "")
    folder = state if os.path.isabs(state) else os.path.expanduser("~/.local/state")
    return Path(folder, "runner", "key")


def _read_key(*, make: bool = False) -> bytes:
    """Returns this user's key; `make` creates one that is missing.

    Raises:
        OSError: it can't be read or created, or others could read it.
    """
    path = _key_path()
    if make and not path.exists():
        _make_key(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        key = file.read(_KEY_BYTES + 1)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        expected = "expected a file of this user that nobody else can read; remove it, and sign your runs anew"
        raise PermissionError(13, expected, str(path))
    if len(key) != _KEY_BYTES:
        raise OSError(22, f"expected {_KEY_BYTES} bytes; remove it, and sign your runs anew", str(path))
    return key


def _make_key(path: Path) -> None:
    """Creates the key atomically: if two processes create one, both use the first."""
    make_folders(path.parent.parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path.parent, 0o700)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(descriptor)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        os.unlink(temporary)


def may_read_git(run: Path, directory: str) -> bool:
    """Returns whether git may read a directory's repository, whose config may name programs that git runs."""
    if not import_path.is_in_run_folder(directory):
        return True
    origin = find_signed(run)
    return origin is not None and _is_same_folder(origin.directory, directory)
