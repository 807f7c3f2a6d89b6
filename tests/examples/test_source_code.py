"""The standard library as data: what is read, how it is split, and that windows are exactly the files' bytes."""

import os
import pickle
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from runner.examples.source_code import SourceCode, in_validation, list_sources


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty files of different sizes, in two folders."""
    (tmp_path / "package").mkdir()
    for index in range(40):
        name = f"package/m{index}.py" if index % 2 else f"m{index}.py"
        (tmp_path / name).write_bytes(f"x{index} = 'é'\n".encode() * (index + 1))
    return tmp_path


def stream_of(folder: Path, dataset: SourceCode) -> bytes:
    return b"".join((folder / name).read_bytes() + b"\0" for name in dataset.files)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("context", [1, 7, 64])
def test_windows_hold_exactly_the_bytes_of_the_files(folder: Path, split: str, context: int) -> None:
    dataset = SourceCode(split, context, validation_fraction=0.3, root=str(folder))
    stream = stream_of(folder, dataset)
    assert len(dataset) == (len(stream) - 1) // context
    for index in range(len(dataset)):
        window = dataset[index]["window"]
        assert window.dtype == torch.uint8
        assert bytes(window.tolist()) == stream[index * context : (index + 1) * context + 1]


def test_splits_share_no_file_and_cover_the_standard_library() -> None:
    train, validation = SourceCode("train"), SourceCode("validation")
    assert not set(train.files) & set(validation.files)
    assert sorted(train.files + validation.files) == list_sources(sysconfig.get_paths()["stdlib"])
    assert {"ast.py", "json/decoder.py"} <= set(train.files + validation.files)


def test_tests_other_packages_and_generated_files_are_left_out() -> None:
    for name in SourceCode("train").files + SourceCode("validation").files:
        folders = name.split("/")[:-1]
        assert not {"site-packages", "test", "tests", "idlelib", "__pycache__"} & set(folders)
        assert not name.startswith("_sysconfigdata")


def test_the_split_of_a_file_depends_only_on_its_name(folder: Path) -> None:
    before = SourceCode("validation", 8, validation_fraction=0.3, root=str(folder)).files
    (folder / "m0.py").write_bytes(b"changed")
    (folder / "added.py").write_bytes(b"new")
    after = SourceCode("validation", 8, validation_fraction=0.3, root=str(folder)).files
    assert [name for name in after if name != "added.py"] == before
    # Fixed values: another checksum would move files between the splits of runs that are compared.
    assert [name for name in ("abc.py", "ast.py", "heapq.py", "this.py") if in_validation(name, 0.5)] == EXPECTED


EXPECTED = ["ast.py", "heapq.py"]


def test_the_fraction_of_validation_files_is_the_requested_one() -> None:
    names = [f"folder/file_{index}.py" for index in range(10_000)]
    assert sum(in_validation(name, 0.05) for name in names) == pytest.approx(500, abs=75)
    assert not any(in_validation(name, 0.0) for name in names)
    assert all(in_validation(name, 1.0) for name in names)


def test_max_windows_are_spread_over_the_whole_stream(folder: Path) -> None:
    every = SourceCode("train", 8, root=str(folder))
    some = SourceCode("train", 8, max_windows=5, root=str(folder))
    assert len(some) == 5
    for index in range(5):
        assert torch.equal(some[index]["window"], every[index * len(every) // 5]["window"])
    assert len(SourceCode("train", 8, max_windows=10**9, root=str(folder))) == len(every)


def test_an_index_out_of_range_is_an_error_so_that_iteration_ends(folder: Path) -> None:
    dataset = SourceCode("train", 8, max_windows=5, root=str(folder))
    assert len(list(dataset)) == 5
    with pytest.raises(IndexError, match="window 5 of 5"):
        dataset[5]


def test_a_sample_owns_its_bytes(folder: Path) -> None:
    dataset = SourceCode("train", 8, root=str(folder))
    before = dataset[0]["window"].clone()
    sample = dataset[0]["window"]
    sample.zero_()
    assert torch.equal(dataset[0]["window"], before)
    assert sample.untyped_storage().nbytes() == 9


def test_a_pickle_is_small_and_reads_the_same_windows() -> None:
    dataset = SourceCode("validation", 32, max_windows=20)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    assert [window["window"].tolist() for window in again] == [window["window"].tolist() for window in dataset]


def test_the_loader_stacks_windows_into_a_batch(folder: Path) -> None:
    batch = next(iter(DataLoader(SourceCode("train", 16, root=str(folder)), batch_size=4)))
    assert batch["window"].shape == (4, 17)


def test_an_interpreter_without_source_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "module.pyc").write_bytes(b"compiled")
    with pytest.raises(FileNotFoundError, match=r"no Python source under .*set root"):
        SourceCode(root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no Python source under"):
        SourceCode(root=str(tmp_path / "python311.zip"))


def test_a_split_without_a_whole_window_is_an_error_that_counts_bytes(tmp_path: Path) -> None:
    (tmp_path / "only.py").write_bytes(b"pass")
    with pytest.raises(ValueError, match=r"train split has 1 of 1 files and 5 bytes, less than one window of 9"):
        SourceCode("train", 8, validation_fraction=0.0, root=str(tmp_path))
    with pytest.raises(ValueError, match="validation split has 0 of 1 files and 0 bytes"):
        SourceCode("validation", 8, validation_fraction=0.0, root=str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "test"}, "split is one of train, validation, not 'test'"),
        ({"context": 0}, "at least 1, not 0"),
        ({"max_windows": 0}, "at least 1, not 256, 0"),
        ({"validation_fraction": 5}, "0 to 1, not 5"),
    ],
)
def test_an_invalid_argument_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceCode(**settings)  # type: ignore[arg-type]


def test_only_regular_files_are_read(folder: Path) -> None:
    before = list_sources(str(folder))
    os.mkfifo(folder / "pipe.py")
    (folder / "zeros.py").symlink_to("/dev/zero")
    assert list_sources(str(folder)) == before
    (folder / "linked.py").symlink_to(folder / "m0.py")
    assert list_sources(str(folder)) == sorted([*before, "linked.py"])


def test_a_file_too_large_for_source_code_is_refused(folder: Path) -> None:
    (folder / "holes.py").touch()
    os.truncate(folder / "holes.py", 1 << 40)
    with pytest.raises(ValueError, match=r"holes\.py is too large: no file may have over 16,777,216 bytes"):
        SourceCode("train", 8, validation_fraction=0.0, root=str(folder))


def test_cycles_of_links_are_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.examples.source_code.MAX_ENTRIES", 1000)
    (folder / "one").symlink_to(".")
    (folder / "two").symlink_to(".")
    with pytest.raises(ValueError, match="over 1,000 entries"):
        list_sources(str(folder))


@pytest.mark.parametrize("arguments", [{"max_windows": 1.5}, {"context": True}, {"validation_fraction": "x"}])
def test_arguments_of_a_wrong_type_are_rejected(folder: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}.* not "):
        SourceCode(root=str(folder), **arguments)
