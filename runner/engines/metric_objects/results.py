"""Results of metrics as numbers by name, and large ones as a picture and a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_MAX_NUMBERS = 64  # entries of a result that are logged one by one
_MAX_SHOWN = 1024  # entries of a result that a text shows one by one
_PICTURE_SIZE = 256  # pixels of the longer side, or more


def to_plain(result: Any) -> Any:
    """Returns a result of `compute` as nested dicts and lists of floats and texts.

    Raises:
        TypeError: it holds something else.
    """
    if isinstance(result, str):
        return result
    if isinstance(result, (bool, int, float)):
        return float(result)
    if isinstance(result, Mapping):
        return {str(key): to_plain(value) for key, value in result.items()}
    if isinstance(result, (tuple, list)):
        return [to_plain(value) for value in result]
    if hasattr(result, "tolist"):  # a tensor or array, or a NumPy number
        values = result.detach().cpu() if isinstance(result, Tensor) else result
        return to_plain(values.tolist())
    raise TypeError(f"expected numbers, tensors or texts, in mappings and lists; found {result!r:.80}")


def flatten(name: str, plain: Any) -> dict[str, Any]:
    """Returns the numbers of a result by name.

    Entries of a mapping are `<name>/<key>`, those of a vector or matrix `<name>_<row>_<column>`. A result with more
    than 64 entries is a text; a matrix is a picture too, whose text is `<name>_values`.
    """
    if isinstance(plain, Mapping):
        items: dict[str, Any] = {}
        for key, value in plain.items():
            items |= flatten(f"{name}/{key}", value)
        return items
    if not isinstance(plain, list):
        return {name: plain}
    numbers = _leaves(plain)
    if len(numbers) <= _MAX_NUMBERS:
        items = {}
        for index, value in enumerate(plain):
            items |= flatten(f"{name}_{index}", value)
        return items or {name: "(no entries)"}
    if not _is_matrix(plain):
        return {name: _describe(plain, numbers)}
    return {name: _draw(plain), f"{name}_values": _describe(plain, numbers)}


def _leaves(plain: Any) -> list[Any]:
    if isinstance(plain, Mapping):
        plain = list(plain.values())
    if not isinstance(plain, list):
        return [plain]
    found = []
    for value in plain:
        found += _leaves(value)
    return found


def _is_matrix(plain: list[Any]) -> bool:
    if not all(isinstance(row, list) and len(row) == len(plain[0]) for row in plain):
        return False
    return all(isinstance(value, float) for row in plain for value in row)


def _describe_row(row: Any) -> str:
    return " ".join(f"{value:g}" for value in _leaves(row))


def _describe(plain: list[Any], leaves: list[Any]) -> str:
    if len(leaves) <= _MAX_SHOWN:
        rows = plain if _is_matrix(plain) else [plain]
        return "\n".join(map(_describe_row, rows))
    values = torch.tensor([value for value in leaves if isinstance(value, float)], dtype=torch.float64)
    return (
        f"{len(leaves)} entries, too many to show: minimum {values.min():g}, mean {values.mean():g}, "
        f"maximum {values.max():g}"
    )


def _draw(matrix: list[list[float]]) -> Tensor:
    """Returns a picture of a matrix, uint8 `[height, width, 3]`: white is its minimum, black its maximum."""
    values = torch.nan_to_num(torch.tensor(matrix, dtype=torch.float64))
    low, high = values.min(), values.max()
    grey = (255 * (1 - (values - low) / (high - low).clamp(min=1e-300))).round().to(torch.uint8)
    factor = max(1, _PICTURE_SIZE // max(grey.shape))
    return grey.repeat_interleave(factor, 0).repeat_interleave(factor, 1)[..., None].expand(-1, -1, 3).contiguous()
