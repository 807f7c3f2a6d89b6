"""`runner.utils.files`: whole writes, and errors that name the file."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.utils.files import AppendFile, held, make_folder, replace_file


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
        make_folder(run / "audio" / "loud", run)
    assert not run.exists()
    run.mkdir()
    for _ in range(2):
        make_folder(run / "audio" / "loud", run)
    assert (run / "audio" / "loud").is_dir()


def test_appending_to_a_deleted_file_is_an_error(tmp_path: Path) -> None:
    file = AppendFile(tmp_path / "a")
    file.append(b"one")
    (tmp_path / "a").unlink()
    with pytest.raises(FileNotFoundError, match="deleted") as caught:
        file.append(b"two")
    assert caught.value.filename == str(tmp_path / "a")
    file.close()


def test_a_held_file_is_refused_to_another_process_until_the_first_has_gone(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    script = "import sys, pathlib, runner.utils.files as f\nwith f.held(pathlib.Path(sys.argv[1])): print('held')"
    other = [sys.executable, "-c", script, str(path)]
    with held(path):
        done = subprocess.run(other, capture_output=True, text=True)
        assert "BlockingIOError" in done.stderr
    assert subprocess.run(other, capture_output=True, text=True).stdout == "held\n"
    assert path.stat().st_mode & 0o777 == 0o600
