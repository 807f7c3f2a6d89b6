"""`runner.utils.modules.selection`: globs over module names."""

import pytest

from runner.utils.modules.selection import matches_glob


@pytest.mark.parametrize(
    ("name", "glob", "is_match"),
    [
        ("layers.1", "layers.1", True),
        ("layers.10", "layers.1", False),
        ("layers.10", "layers.?", False),
        ("layers.1.norm", "layers.*", False),
        ("layers.1.norm", "layers.*.norm", True),
        ("Layers.1", "layers.*", False),
    ],
)
def test_a_glob_matches_whole_segments(name: str, glob: str, is_match: bool) -> None:
    assert matches_glob(name, glob) is is_match
