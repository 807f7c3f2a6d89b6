"""Simulates a power loss: records the file operations of `disk`, and yields the states that they may leave.

The content of a file that was not synchronized may be the last synchronized one, cut in half, or complete. An entry
that was created, changed or removed in a folder that was not synchronized since may be there or not, in any order.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from runner.utils.files import disk

OPERATIONS = ("create", "open_append", "make_folder", "rename", "unlink", "remove_folder", "sync_file", "sync_folder")
Tree = dict[str, bytes | None]  # the content of a file by its path, None of a folder


@dataclass
class Event:
    """A file operation with the line that called it, or a mark with the files written since the last event."""

    kind: str
    path: str = ""
    other: str = ""
    written: dict[str, bytes] = field(default_factory=dict)
    site: str = ""


class Recorder:
    """Records the file operations below a folder, by replacing the functions of `disk`."""

    def __init__(self, root: Path, monkeypatch) -> None:
        self.root, self.events = root, list[Event]()
        self._lock = threading.RLock()
        self._known = dict[str, bytes]()
        for kind in OPERATIONS:
            monkeypatch.setattr(disk, kind, self._recorded(kind, getattr(disk, kind)))

    def mark(self, kind: str, value: object = "") -> None:
        """Records a promise of the program, such as a message about a saved checkpoint."""
        with self._lock:
            self.events.append(Event(kind, str(value), written=self._poll()))

    def _recorded(self, kind, operation):
        def do(path, *rest):
            with self._lock:
                place = Path(path).absolute()
                if self.root not in place.parents and place != self.root:
                    return operation(path, *rest)
                self.events.append(Event("mark", written=self._poll()))
                was_there = place.exists()
                result = operation(path, *rest)
                if not was_there or kind not in ("create", "open_append"):
                    other = self._name(Path(rest[0]).absolute()) if kind == "rename" else ""
                    self.events.append(Event(kind, self._name(place), other, site=_site()))
                return result

        return do

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.root))

    def _poll(self) -> dict[str, bytes]:
        """Returns the files whose content has changed since the last call."""
        found = {self._name(path): path.read_bytes() for path in self.root.rglob("*") if path.is_file()}
        changed = {name: content for name, content in found.items() if self._known.get(name) != content}
        self._known = found
        return changed


def _site() -> str:
    """Returns the line of the runner that called an operation; for `AppendFile.sync`, the line that called it."""
    frame = sys._getframe(2)
    while frame is not None:
        module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module.startswith("runner.") and (module, function) != ("runner.utils.files.files", "sync"):
            return f"{module.removeprefix('runner.')}.{function}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


class _File:
    def __init__(self) -> None:
        self.now, self.durable = b"", b""

    def content(self, which: str) -> bytes:
        """Returns one of the contents that may be left: the durable one, with half of the later bytes, or all."""
        half = (len(self.durable) + len(self.now)) // 2
        return {"durable": self.durable, "half": self.now[:half], "now": self.now}[which]


class _Folder:
    def __init__(self) -> None:
        self.now: dict[str, _File | _Folder] = {}
        self.durable: dict[str, _File | _Folder] = {}
        self.pending: list[dict[str, _File | _Folder | None]] = []

    def change(self, entries: dict[str, _File | _Folder | None]) -> None:
        self.pending.append(entries)
        _apply(self.now, entries)


def _apply(names: dict, entries: dict) -> None:
    for name, node in entries.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class Disk:
    """Files and folders, with their current and their durable state."""

    def __init__(self) -> None:
        self.root = _Folder()

    def _find(self, path: str):
        node = self.root
        for part in Path(path).parts:
            node = node.now[part]
        return node

    def do(self, event: Event) -> None:
        """Applies an event."""
        for name, content in event.written.items():
            try:
                self._find(name).now = content
            except (KeyError, AttributeError):  # locks and logs are not created through `disk`
                continue
        folder, name = (str(Path(event.path).parent), Path(event.path).name) if event.path else ("", "")
        if event.kind in ("create", "open_append"):
            self._find(folder).change({name: _File()})
        elif event.kind == "make_folder":
            self._find(folder).change({name: _Folder()})
        elif event.kind == "rename":
            self._find(folder).change({name: None, Path(event.other).name: self._find(event.path)})
        elif event.kind in ("unlink", "remove_folder"):
            self._find(folder).change({name: None})
        elif event.kind == "sync_file":
            node = self._find(event.path)
            node.durable = node.now
        elif event.kind == "sync_folder":
            node = self._find(event.path)
            node.durable, node.pending = dict(node.now), []

    def states(self) -> Iterator[Tree]:
        """Yields states that a power loss may leave: each change alone kept or lost, and all kept or lost."""
        folders, files = self._reachable()
        changes = [(folder, index) for folder in folders for index in range(len(folder.pending))]
        unsure = [file for file in files if file.now != file.durable]
        everything = set(range(len(changes)))
        contents = [dict.fromkeys(map(id, unsure), how) for how in ("durable", "half", "now")]
        contents += [{id(file): "durable" if file is lost else "now" for file in unsure} for lost in unsure]
        chosen = [everything, set(), *({each} for each in everything), *(everything - {each} for each in everything)]
        for kept in chosen:
            for how in contents if kept == everything else (contents[0], contents[2]):
                kept_changes = {(id(changes[each][0]), changes[each][1]) for each in kept}
                yield dict(self._tree(self.root, "", kept_changes, how))

    def _reachable(self):
        folders, files, seen, todo = [], [], set(), [self.root]
        while todo:
            node = todo.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            if isinstance(node, _File):
                files.append(node)
                continue
            folders.append(node)
            todo += [*node.now.values(), *node.durable.values()]
            todo += [child for entries in node.pending for child in entries.values() if child is not None]
        return folders, files

    def _tree(self, folder: _Folder, prefix: str, kept, how) -> Iterator[tuple[str, bytes | None]]:
        names = dict(folder.durable)
        for index, entries in enumerate(folder.pending):
            if (id(folder), index) in kept:
                _apply(names, entries)
        for name, node in names.items():
            if isinstance(node, _Folder):
                yield prefix + name, None
                yield from self._tree(node, f"{prefix}{name}/", kept, how)
            else:
                which = how.get(id(node), "now")
                yield prefix + name, node.content(which)


def write_tree(tree: Tree, root: Path) -> None:
    """Writes a state to an empty folder."""
    for name, content in tree.items():
        if content is None:
            (root / name).mkdir(parents=True, exist_ok=True)
        else:
            (root / name).write_bytes(content)
