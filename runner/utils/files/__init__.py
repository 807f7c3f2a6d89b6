"""Files that are replaced whole, files that only grow, files that one process holds, and files read within bounds."""

from runner.utils.files.files import (
    AppendFile,
    EagerFile,
    UnreadableError,
    atomic_path,
    check_regular,
    find_files,
    held,
    iterate_lines,
    make_folder,
    make_folders,
    open_regular,
    read_bounded,
    remove_tree,
    replace_file,
)

__all__ = [
    "AppendFile",
    "EagerFile",
    "UnreadableError",
    "atomic_path",
    "check_regular",
    "find_files",
    "held",
    "iterate_lines",
    "make_folder",
    "make_folders",
    "open_regular",
    "read_bounded",
    "remove_tree",
    "replace_file",
]
