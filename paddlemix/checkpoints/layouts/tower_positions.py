"""A vision tower's position embeddings for another image size: bicubic interpolation of their grid.

The class token's row stays as it is.  Equal to torch's `interpolate(mode="bicubic", align_corners=False)` in float32;
only sums of products of single numbers, so that every machine gets the same bits.
Source: Keys 1981, "Cubic convolution interpolation for digital image processing", with a = -0.75 as torch has it.
"""

from __future__ import annotations

import math

import numpy as np

from paddlemix.checkpoints.files.tensors import TensorEntry, convert
from paddlemix.errors import UserError

_A = np.float32(-0.75)  # the cubic kernel's parameter in torch; Pillow and OpenCV have others


def resized_positions(entry: TensorEntry, side: int) -> TensorEntry:
    """Position embeddings for a grid of side x side patches, unread.

    Args:
        entry: [1 + s * s, C] for a grid of s x s, the class token first.
        side: patches across and down, >= 1.

    Returns:
        [1 + side * side, C] of the same type, computed in float32.

    Raises:
        UserError: the rows are not a class token and a square grid.
    """
    table_side(entry.shape[0])

    def read() -> np.ndarray:
        table = convert(entry.read(), entry.dtype, "F32")
        return convert(interpolate(table, side), "F32", entry.dtype)

    return TensorEntry(entry.dtype, (1 + side * side, entry.shape[1]), read)


def table_side(rows: int) -> int:
    """Patches across of the square grid that a table of this many rows, one of them the class token's, is for.

    Raises:
        UserError: the rows are not a class token and a square grid.
    """
    side = math.isqrt(max(rows - 1, 0))
    if not side or side * side != rows - 1:
        raise UserError(
            f"a table of {rows} position embeddings is not a class token and a square grid and cannot be interpolated"
        )
    return side


def interpolate(table: np.ndarray, side: int) -> np.ndarray:
    """See `resized_positions`; float32 [1 + s * s, C] -> float32 [1 + side * side, C]."""
    before, width = table_side(len(table)), table.shape[1]
    if before == side:
        return table
    # separable: first along the rows, then along the columns of what came out
    grid = table[1:].reshape(before, before, width)
    places, weights = _taps(before, side)
    across = _weighted(grid[:, places], weights, axis=2)  # [s, side, 4, C] -> [s, side, C]
    down = _weighted(across[places], weights.reshape(side, 4, 1), axis=1)  # [side, 4, side, C] -> [side, side, C]
    return np.concatenate([table[:1], down.reshape(side * side, width)])


def _weighted(values: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
    """The sum over the four taps on `axis`, in their order."""
    parts = [np.take(values, tap, axis=axis) * weights[:, tap, None] for tap in range(4)]
    return parts[0] + parts[1] + parts[2] + parts[3]


def _taps(before: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The four cells that each new cell is made of, int [side, 4], and their weights, float32 [side, 4]."""
    # centres of the new cells in units of old ones, as align_corners=False has them
    scale = np.float32(before) / np.float32(side)
    centre = scale * (np.arange(side, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    first = np.floor(centre)
    offset = centre - first
    cells = first.astype(np.int64)[:, None] + np.arange(-1, 3)
    distances = (offset + 1, offset, 1 - offset, 2 - offset)
    weights = np.stack([_outer(distances[0]), _inner(distances[1]), _inner(distances[2]), _outer(distances[3])], axis=1)
    # beyond the edge the edge is repeated
    return np.clip(cells, 0, before - 1), weights


def _inner(x: np.ndarray) -> np.ndarray:
    """Weight at a distance of up to 1."""
    return ((_A + 2) * x - (_A + 3)) * x * x + 1


def _outer(x: np.ndarray) -> np.ndarray:
    """Weight at a distance of 1 to 2."""
    return ((_A * x - 5 * _A) * x + 8 * _A) * x - 4 * _A
