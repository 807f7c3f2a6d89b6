"""`runner.utils.modules.selection`: which modules are blocks, and what a glob fits."""

import pytest

from runner.utils.modules.selection import matches


@pytest.mark.parametrize(
    ("name", "glob", "fits"),
    [
        ("layers.1", "layers.1", True),
        ("layers.10", "layers.1", False),
        ("layers.10", "layers.?", False),
        ("layers.1.norm", "layers.*", False),
        ("layers.1.norm", "layers.*.norm", True),
        ("Layers.1", "layers.*", False),
    ],
)
def test_a_glob_fits_whole_segments(name: str, glob: str, fits: bool) -> None:
    assert matches(name, glob) is fits
