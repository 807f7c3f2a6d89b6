"""`runner.utils.files.disk`: below a confined folder no operation follows a link out of it."""

import errno
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flips import flipped

from runner.utils import io
from runner.utils.files import (
    AppendFile,
    disk,
    list_tree,
    lock_file,
    make_folder_below,
    make_folders,
    remove_tree,
    replace_file,
)
from runner.utils.files.disk import confine


class Folders:
    """A confined folder `run` with a subfolder, and a folder `decoy` beside it that must not change."""

    def __init__(self, parent: Path) -> None:
        self.run, self.decoy = parent / "run", parent / "decoy"
        (self.run / "inner").mkdir(parents=True)
        (self.decoy / "deep").mkdir(parents=True)
        (self.decoy / "file").write_text("the user's own")
        (self.run / "inner" / "file").write_text("the run's")

    def seen(self) -> dict[str, tuple[int, int, str | None]]:
        """The state of the decoy that an operation could change."""
        found = {}
        for path in [self.decoy, *sorted(self.decoy.rglob("*"))]:
            status, content = path.lstat(), path.read_text() if path.is_file() else None
            found[str(path)] = (status.st_ino, status.st_mtime_ns, content)
        return found


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Folders]:
    made = Folders(tmp_path)
    with confine(made.run):
        yield made


def hold(path: Path) -> None:
    with lock_file(path):
        pass


def append(path: Path) -> None:
    file = AppendFile(path)
    file.append(b"more")
    file.close()


WRITES: dict[str, Callable[[Path], object]] = {
    "create": lambda path: disk.create(path, "wb").close(),
    "create new": lambda path: disk.create(path.with_name("new"), "xb").close(),
    "append": append,
    "hold": hold,
    "replace": lambda path: replace_file(path, [b"new"]),
    "save": lambda path: io.save({"a": 1}, path.with_name("a.safetensors")),
    "write JSON": lambda path: io.write_json([1], path),
    "make folder": lambda path: disk.make_folder(path.with_name("new")),
    "make folders": lambda path: make_folders(path.with_name("new") / "newer"),
    "remove folder": lambda path: disk.remove_folder(path.with_name("deep")),
    "unlink": disk.unlink,
    "rename away": lambda path: disk.rename(path, path.parents[1] / "taken"),
    "rename to": lambda path: disk.rename(path.parents[1] / "inner" / "file", path),
    "sync file": disk.sync_file,
    "sync folder": lambda path: disk.sync_folder(path.parent),
    "read": lambda path: disk.open_read(path).close(),
    "list": lambda path: disk.list_folder(path.parent),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("target", ["../decoy", "absolute", "inner"])
def test_a_link_among_the_parents_is_refused_with_its_name(
    folders: Folders, write: Callable[[Path], object], target: str
) -> None:
    (folders.run / "way").symlink_to(folders.decoy if target == "absolute" else target)
    before = folders.seen()
    with pytest.raises(OSError, match="a link, which is not followed") as caught:
        write(folders.run / "way" / "file")
    assert (caught.value.errno, caught.value.filename) == (errno.ELOOP, str(folders.run / "way"))
    assert folders.seen() == before
    assert sorted(os.listdir(folders.run)) == ["inner", "way"]
    assert os.listdir(folders.run / "inner") == ["file"]


@pytest.mark.parametrize("name", ["create", "append", "hold", "sync file", "read"])
def test_opening_a_link_is_refused(folders: Folders, name: str) -> None:
    (folders.run / "file").symlink_to(folders.decoy / "file")
    (folders.run / "none").symlink_to(folders.decoy / "none")
    before = folders.seen()
    for link in ("file", "none"):
        with pytest.raises(OSError, match="a link, which is not followed") as caught:
            WRITES[name](folders.run / link)
        assert caught.value.filename == str(folders.run / link)
    assert folders.seen() == before


@pytest.mark.parametrize("name", ["create", "append", "hold", "sync file", "read"])
def test_opening_a_pipe_is_refused_without_blocking(folders: Folders, name: str) -> None:
    os.mkfifo(folders.run / "pipe")
    with pytest.raises(OSError, match="no regular file") as caught:
        WRITES[name](folders.run / "pipe")
    assert caught.value.filename == str(folders.run / "pipe")


def test_an_opened_file_is_in_blocking_mode(folders: Folders) -> None:
    descriptor = disk.open_append(folders.run / "file")
    assert os.get_blocking(descriptor)
    assert not os.get_inheritable(descriptor)
    os.close(descriptor)


@pytest.mark.parametrize("target", ["file", "deep", "none"])
def test_a_link_itself_is_replaced_or_removed(folders: Folders, target: str) -> None:
    before = folders.seen()
    for name in ("replaced.json", "removed"):
        (folders.run / name).symlink_to(folders.decoy / target)
    io.write_json([1], folders.run / "replaced.json")
    disk.unlink(folders.run / "removed")
    assert io.read_json(folders.run / "replaced.json") == [1]
    assert not (folders.run / "replaced.json").is_symlink()
    assert not (folders.run / "removed").is_symlink()
    assert folders.seen() == before


def test_a_tree_is_removed_with_its_links_but_not_their_targets(folders: Folders) -> None:
    before = folders.seen()
    (folders.run / "inner" / "link").symlink_to(folders.decoy)
    (folders.run / "tree").symlink_to(folders.decoy)
    remove_tree(folders.run / "inner")
    remove_tree(folders.run / "tree")
    assert os.listdir(folders.run) == ["tree"]
    assert folders.seen() == before


def test_a_link_to_a_tree_is_not_removed(tmp_path: Path) -> None:
    made = Folders(tmp_path)
    before = made.seen()
    (made.run / "tree").symlink_to(made.decoy)
    remove_tree(made.run / "tree")
    assert made.seen() == before


def test_a_very_deep_tree_is_left_without_an_error(folders: Folders) -> None:
    deep = str(folders.run / "inner")
    for _ in range(100):
        deep += "/a"
        os.mkdir(deep)
    remove_tree(folders.run / "inner")
    assert os.path.isdir(deep)


@pytest.mark.parametrize("name", ["../decoy/new", "inner/../../decoy/new", "/absolute"])
def test_a_folder_outside_of_the_run_is_not_created(folders: Folders, name: str) -> None:
    before = folders.seen()
    with pytest.raises(OSError, match="not a place in the run's folder"):
        make_folder_below(folders.run / name, folders.run)
    assert folders.seen() == before


def test_a_link_is_not_accepted_as_an_existing_folder(folders: Folders) -> None:
    (folders.run / "audio").symlink_to(folders.decoy)
    with pytest.raises(OSError, match="a link, which is not followed"):
        make_folder_below(folders.run / "audio", folders.run)


def test_every_operation_works_below_the_folder_as_it_does_elsewhere(folders: Folders, tmp_path: Path) -> None:
    make_folder_below(folders.run / "one" / "two", folders.run)
    replace_file(folders.run / "one" / "two" / "a", [b"a"])
    with disk.create(folders.run / "one" / "b", "xb") as file:
        file.write(b"b")
        assert file.name == str(folders.run / "one" / "b")
    disk.rename(folders.run / "one" / "two", folders.run / "three")
    disk.rename(folders.run / "one" / "b", tmp_path / "b")
    disk.rename(tmp_path / "b", folders.run / "three" / "b")
    append(folders.run / "three" / "b")
    for folder in (folders.run, folders.run / "three"):
        disk.sync_folder(folder)
    assert disk.list_folder(folders.run) == [("inner", True), ("one", True), ("three", True)]
    assert disk.list_folder(folders.run) == disk.list_folder(folders.run)
    assert (folders.run / "three" / "b").read_bytes() == b"bmore"
    assert list_tree(folders.run)[0] == [
        folders.run / "inner" / "file", folders.run / "three" / "a", folders.run / "three" / "b",
    ]  # fmt: skip
    with pytest.raises(FileExistsError) as caught:
        disk.create(folders.run / "three" / "b", "xb")
    assert caught.value.filename == str(folders.run / "three" / "b")
    with pytest.raises(FileNotFoundError) as missing:
        disk.unlink(folders.run / "none" / "b")
    assert missing.value.filename == str(folders.run / "none")


def test_a_path_is_confined_as_it_is_written_from_anywhere(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    (folders.run / "way").symlink_to(folders.decoy)
    monkeypatch.chdir(folders.run)
    for path in (Path("way/file"), Path("../run/way/file"), Path("inner/../way/file")):
        with pytest.raises(OSError, match="a link, which is not followed"):
            disk.create(path, "wb")


def test_the_folder_may_itself_be_reached_by_a_link_of_the_users(tmp_path: Path) -> None:
    made = Folders(tmp_path)
    (tmp_path / "alias").symlink_to(made.run)
    (made.run / "way").symlink_to(made.decoy)
    before = made.seen()
    with confine(tmp_path / "alias"):
        replace_file(tmp_path / "alias" / "a", [b"a"])
        for folder in (tmp_path / "alias", made.run):
            with pytest.raises(OSError, match="a link, which is not followed"):
                replace_file(folder / "way" / "file", [b"new"])
    assert (made.run / "a").read_bytes() == b"a"
    assert made.seen() == before


def test_a_recorded_link_is_followed_as_long_as_it_leads_where_it_was_recorded_to(tmp_path: Path) -> None:
    made, storage = Folders(tmp_path), tmp_path / "storage"
    (storage / "deep").mkdir(parents=True)
    (made.run / "checkpoints").symlink_to("../storage")
    before = made.seen()
    with confine(made.run, {"checkpoints": str(storage)}):
        make_folder_below(made.run / "checkpoints", made.run)
        replace_file(made.run / "checkpoints" / "deep" / "a", [b"a"])
        assert (storage / "deep" / "a").read_bytes() == b"a"
        (storage / "way").symlink_to(made.decoy)
        with pytest.raises(OSError, match="a link, which is not followed") as caught:
            replace_file(made.run / "checkpoints" / "way" / "file", [b"new"])
        assert caught.value.filename == str(made.run / "checkpoints" / "way")
        (made.run / "checkpoints").unlink()
        (made.run / "checkpoints").symlink_to(made.decoy)
        with pytest.raises(OSError, match="a link, which is not followed"):
            replace_file(made.run / "checkpoints" / "file", [b"new"])
        (made.run / "checkpoints").unlink()
        (made.run / "checkpoints").symlink_to(storage)
        storage.rename(tmp_path / "away")
        with pytest.raises(FileNotFoundError):
            replace_file(made.run / "checkpoints" / "file", [b"new"])
        storage.symlink_to(made.decoy)
        with pytest.raises(OSError, match="a link, which is not followed"):
            replace_file(made.run / "checkpoints" / "file", [b"new"])
    assert made.seen() == before


def test_no_descriptor_of_a_confined_folder_remains(tmp_path: Path) -> None:
    made = Folders(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    for folder in (made.run, other):
        (folder / "way").symlink_to(made.decoy)
    num_open = len(os.listdir("/proc/self/fd"))
    with confine(other, {"way": str(made.decoy)}), confine(made.run):
        replace_file(other / "way" / "a", [b"a"])
        with pytest.raises(OSError, match="a link, which is not followed"):
            replace_file(made.run / "way" / "a", [b"b"])
    replace_file(made.run / "way" / "a", [b"c"])
    assert (made.decoy / "a").read_bytes() == b"c"
    with confine(other), pytest.raises(OSError, match="a link, which is not followed"):
        replace_file(other / "way" / "a", [b"d"])
    assert len(os.listdir("/proc/self/fd")) == num_open


def test_a_folder_can_be_confined_inside_another(tmp_path: Path) -> None:
    made = Folders(tmp_path)
    (made.run / "way").symlink_to(made.decoy)
    with confine(made.run):
        with pytest.raises(OSError, match="a link, which is not followed"), confine(made.run / "way"):
            pass
        with confine(made.run / "inner"):
            replace_file(made.run / "inner" / "a", [b"a"])
            with pytest.raises(OSError, match="a link, which is not followed"):
                replace_file(made.run / "way" / "a", [b"a"])
    assert (made.run / "inner" / "a").read_bytes() == b"a"


def test_a_folder_that_was_moved_away_is_not_written_to(folders: Folders, tmp_path: Path) -> None:
    folders.run.rename(tmp_path / "moved")
    for other in (None, folders.decoy):
        if other is not None:
            folders.run.symlink_to(other)
        with pytest.raises(FileNotFoundError):
            replace_file(folders.run / "a", [b"a"])
    assert not (tmp_path / "moved" / "a").exists()
    assert not (folders.decoy / "a").exists()
    folders.run.unlink()
    folders.run.symlink_to(tmp_path / "moved")
    replace_file(folders.run / "a", [b"a"])
    assert (tmp_path / "moved" / "a").read_bytes() == b"a"


def test_threads_are_confined_and_so_are_forked_children(folders: Folders) -> None:
    (folders.run / "way").symlink_to(folders.decoy)
    refused = []

    def write() -> None:
        try:
            replace_file(folders.run / "way" / "a", [b"a"])
        except OSError as error:
            refused.append(error.errno)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    write()
    assert refused == [errno.ELOOP, errno.ELOOP]


def test_a_forked_child_is_confined(tmp_path: Path) -> None:
    made = Folders(tmp_path)
    (made.run / "way").symlink_to(made.decoy)
    script = """
import os, sys
from pathlib import Path
from runner.utils.files.disk import confine
from runner.utils.files import replace_file
with confine(Path(sys.argv[1])):
    if os.fork():
        sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
    replace_file(Path(sys.argv[1]) / "inner" / "a", [b"a"])
    try:
        replace_file(Path(sys.argv[1]) / "way" / "a", [b"a"])
    except OSError as error:
        os._exit(error.errno)
"""
    done = subprocess.run([sys.executable, "-c", script, made.run])
    assert done.returncode == errno.ELOOP
    assert (made.run / "inner" / "a").read_bytes() == b"a"
    assert not (made.decoy / "a").exists()


def test_no_write_escapes_a_folder_that_becomes_a_link_at_any_moment(folders: Folders) -> None:
    before = folders.seen()
    inner = folders.run / "inner"
    writes: list[Callable[[], object]] = [
        lambda: replace_file(inner / "file", [b"new"]),
        lambda: append(inner / "file"),
        lambda: make_folder_below(inner / "deep", folders.run),
        lambda: replace_file(inner / "deep" / "file", [b"new"]),
        lambda: disk.rename(inner / "deep", inner / "renamed"),
        lambda: remove_tree(inner / "renamed"),
        lambda: disk.unlink(inner / "file"),
        lambda: hold(inner / "lock"),
    ]
    num_done, num_refused = Counter[int](), Counter[int]()
    with flipped(folders.run, folders.decoy, "inner"):
        while min(num_done.total(), num_refused.total()) < 300 or len(num_done) < len(writes):
            for number, write in enumerate(writes):
                try:
                    write()
                except OSError:
                    num_refused[number] += 1
                else:
                    num_done[number] += 1
    assert num_done.keys() == {*range(len(writes))}
    assert folders.seen() == before
