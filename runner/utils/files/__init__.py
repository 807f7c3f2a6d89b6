"""Files: atomic replacement, appending, locking, and bounded reading."""

from runner.utils.files.files import (
    AppendFile,
    UnreadableError,
    WritebackFile,
    adding_path,
    atomic_path,
    check_regular,
    iterate_lines,
    list_tree,
    lock_file,
    make_folder_below,
    make_folders,
    open_regular,
    read_bounded,
    remove_tree,
    replace_file,
)

__all__ = [
    "AppendFile",
    "UnreadableError",
    "WritebackFile",
    "adding_path",
    "atomic_path",
    "check_regular",
    "iterate_lines",
    "list_tree",
    "lock_file",
    "make_folder_below",
    "make_folders",
    "open_regular",
    "read_bounded",
    "remove_tree",
    "replace_file",
]
