"""`runner.files`: whole writes, and errors that name the file."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.files import AppendFile, replace_file


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


def test_an_error_names_the_file_and_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "a"
    with pytest.raises(FileNotFoundError, match="make the folder writable") as caught:
        replace_file(path, [b"x"])
    assert caught.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as caught:
        AppendFile(path)
    assert caught.value.filename == str(path)
