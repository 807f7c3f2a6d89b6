"""`runner.utils.files`: atomic writes, and errors that name the file."""

import io
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.utils.files import (
    AppendFile,
    UnreadableError,
    check_regular,
    iterate_lines,
    lock_file,
    make_folder_below,
    open_regular,
    read_bounded,
    replace_file,
)


def test_what_was_appended_is_visible_at_once_and_kept_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for content in (b"one\n", b"two\n"):
        file = AppendFile(path)
        file.append(content)
        assert path.read_bytes().endswith(content)
        file.sync()
        file.close()
        file.close()
    assert path.read_bytes() == b"one\ntwo\n"


def test_a_write_that_fails_half_way_leaves_the_old_content_alone(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail() -> Iterator[bytes]:
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(path, fail())
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_an_error_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "a"
    with pytest.raises(FileNotFoundError) as caught:
        replace_file(path, [b"x"])
    assert caught.value.filename == str(path)
    assert not path.parent.exists()
    with pytest.raises(FileNotFoundError) as caught:
        AppendFile(path)
    assert caught.value.filename == str(path)


def test_a_folder_is_made_below_a_runs_folder_that_exists_and_never_that_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="the run's folder was deleted"):
        make_folder_below(run / "audio" / "loud", run)
    assert not run.exists()
    run.mkdir()
    for _ in range(2):
        make_folder_below(run / "audio" / "loud", run)
    assert (run / "audio" / "loud").is_dir()


def test_appending_to_a_deleted_file_is_an_error(tmp_path: Path) -> None:
    file = AppendFile(tmp_path / "a")
    file.append(b"one")
    (tmp_path / "a").unlink()
    with pytest.raises(FileNotFoundError, match="deleted") as caught:
        file.append(b"two")
    assert caught.value.filename == str(tmp_path / "a")
    file.close()


def test_a_locked_file_is_refused_to_another_process_until_the_first_ends(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    script = "import sys, pathlib, runner.utils.files as f\nwith f.lock_file(pathlib.Path(sys.argv[1])): print('held')"
    other = [sys.executable, "-c", script, str(path)]
    with lock_file(path):
        done = subprocess.run(other, capture_output=True, text=True)
        assert "BlockingIOError" in done.stderr
    assert subprocess.run(other, capture_output=True, text=True).stdout == "held\n"
    assert path.stat().st_mode & 0o777 == 0o600


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


KINDS = {
    "a FIFO": os.mkfifo,
    "a folder": os.mkdir,
    "a link": lambda path: os.symlink(path.with_name("file"), path),
    "a device": lambda path: path.parent.rmdir() or os.symlink("/dev", path.parent),
    "a socket": bind,
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_irregular_file_is_refused_at_once_with_its_kind(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_bytes(b"content")
    path = tmp_path / "x"
    if kind == "a device":
        path = tmp_path / "dev" / "zero"
        path.parent.mkdir()
    elif kind == "a socket":
        path = Path(tempfile.mkdtemp(dir="/tmp")) / "s"  # the path of a socket must be short
    KINDS[kind](path)
    for read in (lambda path: read_bounded(path, 100), check_regular, open_regular):
        with pytest.raises(UnreadableError) as raised:
            read(path)
        assert str(raised.value) == f"{path}: is {kind}, expected a regular file"
        assert (raised.value.filename, raised.value.strerror) == (str(path), f"is {kind}, expected a regular file")
    if kind == "a link":
        with open_regular(path, follows_link=True) as file:
            assert file.read() == b"content"


def test_a_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    assert read_bounded(tmp_path / "x", 5) == b"12345"
    with pytest.raises(UnreadableError, match="is larger than 4 bytes"):
        read_bounded(tmp_path / "x", 4)
    os.truncate(tmp_path / "x", 1 << 40)
    with pytest.raises(UnreadableError, match="is larger than 4 bytes"):
        read_bounded(tmp_path / "x", 4)
    with pytest.raises(FileNotFoundError):
        read_bounded(tmp_path / "none", 4)


@given(st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b".") + b"\n")), st.integers(1, 15))
def test_lines_are_complete_or_none_if_too_long(lines: list[bytes], most: int) -> None:
    expected = [line if len(line) <= most else None for line in lines]
    assert list(iterate_lines(io.BytesIO(b"".join(lines)), most)) == expected
    assert list(iterate_lines(io.BytesIO(b"".join(lines) + b"x"), most)) == [*expected, b"x"]
