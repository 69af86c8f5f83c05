"""How many visual tokens an image has, and in which order: from its width and height alone, in numpy.

One layout function serves the count, the gathered rows and the tiles that `tiles.py` cuts, so they cannot disagree.
Knows no pixel, no file, no model and no tokenizer.

Source: haotian-liu/LLaVA llava/mm_utils.py and llava/model/llava_arch.py (commit c121f04).
"""

from __future__ import annotations

import math

import numpy as np

from paddlemix.errors import UserError
from paddlemix.processors.images.image_spec import ImageSpec
from paddlemix.sample import NEWLINE_INDEX


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise UserError(f"image size {width}x{height}: both sides must be at least 1 pixel")


def best_resolution(width: int, height: int, spec: ImageSpec) -> tuple[int, int]:
    """The allowed grid that keeps most of an image: largest effective resolution, then least waste, then first listed.

    Args:
        width, height: original image size, pixels, >= 1.

    Returns:
        (width, height) in pixels, one of `spec.grid_pinpoints`.
    """
    _check_size(width, height)
    best, best_effective, best_wasted = spec.grid_pinpoints[0], 0, math.inf
    for grid_width, grid_height in spec.grid_pinpoints:
        # pixels of the picture that survive; enlarging adds none
        scale = min(grid_width / width, grid_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        wasted = grid_width * grid_height - effective
        if effective > best_effective or (effective == best_effective and wasted < best_wasted):
            best, best_effective, best_wasted = (grid_width, grid_height), effective, wasted
    return best


def grid_shape(width: int, height: int, spec: ImageSpec) -> tuple[int, int]:
    """Tiles across and down, (1, 1) for modes other than "anyres"."""
    if spec.aspect_mode != "anyres":
        return 1, 1
    grid_width, grid_height = best_resolution(width, height, spec)
    return grid_width // spec.tile_size, grid_height // spec.tile_size


def count_tiles(width: int, height: int, spec: ImageSpec) -> int:
    """Tiles that one image becomes: 1, or for "anyres" the whole image and its grid.

    Raises:
        UserError: a side is 0.
    """
    _check_size(width, height)
    if spec.aspect_mode != "anyres":
        return 1
    across, down = grid_shape(width, height, spec)
    return 1 + across * down


def count_visual_tokens(width: int, height: int, spec: ImageSpec) -> int:
    """Number of language-model positions that one image takes.

    Args:
        width, height: original image size, pixels, >= 1.

    Returns:
        576 for LLaVA-1.5; 576 to 2,928 for LLaVA-1.6 at 336 px.

    Raises:
        UserError: a side is 0.

    Source: LLaVA-NeXT blog, "Dynamic High Resolution".
    """
    # aspect_mode, merge_type  -> tokens
    # anyres, spatial_unpad    -> whole picture + rows x (columns + 1 newline) of the part that is not padding
    # anything else            -> all patches of all tiles
    if spec.aspect_mode != "anyres" or spec.merge_type != "spatial_unpad":
        return count_tiles(width, height, spec) * spec.tokens_per_tile
    rows, columns = _kept_cells(width, height, spec)
    return spec.tokens_per_tile + (rows.stop - rows.start) * (columns.stop - columns.start + 1)


def visual_token_index(width: int, height: int, spec: ImageSpec) -> np.ndarray:
    """The feature row at each visual token of one image.

    Args:
        width, height: original image size, pixels, >= 1.

    Returns:
        int64 [T] with values in 0 .. tiles * tokens_per_tile - 1, and `NEWLINE_INDEX` at row ends; T equals
        `count_visual_tokens`.
    """
    per_tile = spec.tokens_per_tile
    if spec.aspect_mode != "anyres" or spec.merge_type == "flat":
        return np.arange(count_tiles(width, height, spec) * per_tile, dtype=np.int64)
    across, down = grid_shape(width, height, spec)
    side = spec.patches_per_side
    # [tiles down, tiles across, patches down, patches across]; the tower returns them tile by tile
    grid = np.arange(across * down * per_tile, dtype=np.int64).reshape(down, across, side, side)
    grid = per_tile + grid.transpose(0, 2, 1, 3).reshape(down * side, across * side)  # tile rows become image rows
    whole = np.arange(per_tile, dtype=np.int64)
    if spec.merge_type == "spatial":
        return np.concatenate([whole, grid.reshape(-1)])
    rows, columns = _kept_cells(width, height, spec)
    kept = grid[rows, columns]
    newline = np.full((kept.shape[0], 1), NEWLINE_INDEX, dtype=np.int64)
    return np.concatenate([whole, np.concatenate([kept, newline], axis=1).reshape(-1)])


def _kept_cells(width: int, height: int, spec: ImageSpec) -> tuple[slice, slice]:
    """Rows and columns of the grid's patch cells that hold image rather than padding.

    The order of the floating-point operations is the reference's: other orders differ at sizes such as 328x205."""
    across, down = grid_shape(width, height, spec)
    grid_width, grid_height = across * spec.patches_per_side, down * spec.patches_per_side
    if width / height > grid_width / grid_height:
        padding = (grid_height - int(height * (grid_width / width))) // 2
        return slice(padding, grid_height - padding), slice(0, grid_width)
    padding = (grid_width - int(width * (grid_height / height))) // 2
    return slice(0, grid_height), slice(padding, grid_width - padding)
