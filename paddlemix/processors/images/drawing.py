"""Tiles as the vision tower sees them -> a picture for people to look at, with PIL alone.

Undoes the normalisation of `tiles.py`; nothing else of an image is known here.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from paddlemix.errors import UserError
from paddlemix.processors.images.image_spec import ImageSpec

_GAP = 8  # pixels between the whole image and its grid
_SEAM = 2  # pixels between the tiles of a grid
_BACKGROUND = (255, 0, 255)  # a colour that photos do not have, so that black padding shows


def denormalise_tiles(pixel_values: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """Pixels of tiles as bytes again, the reverse of `tiles.normalise_tiles`.

    Args:
        pixel_values: float32 [N, 3, H, W].

    Returns:
        uint8 [N, H, W, 3].
    """
    mean, std = (np.array(values, dtype=np.float32).reshape(1, 3, 1, 1) for values in (spec.mean, spec.std))
    shares = pixel_values * std + mean
    return np.clip(np.rint(shares * 255), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)  # [N, H, W, 3]


def draw_tiles(pixel_values: np.ndarray, grid: tuple[int, int], spec: ImageSpec) -> Image.Image:
    """Draws the tiles of one image: the whole image at the left, its grid beside it.

    Args:
        pixel_values: float32 [N, 3, H, W], the tiles of one image in order.
        grid: tiles across and down, as `visual_tokens.grid_shape` returns it; (1, 1) for the whole image alone.

    Raises:
        UserError: the number of tiles is not that of the grid.
    """
    across, down = grid
    expected = 1 if len(pixel_values) == 1 else 1 + across * down
    if len(pixel_values) != expected:
        raise UserError(f"{len(pixel_values)} tiles cannot be drawn as a grid of {across} x {down} and the whole image")
    tiles = [Image.fromarray(tile) for tile in denormalise_tiles(pixel_values, spec)]
    if len(tiles) == 1:
        return tiles[0]
    size = spec.tile_size
    step = size + _SEAM
    width, height = size + _GAP + across * step - _SEAM, max(size, down * step - _SEAM)
    canvas = Image.new("RGB", (width, height), _BACKGROUND)
    canvas.paste(tiles[0], (0, 0))
    for number, tile in enumerate(tiles[1:]):
        canvas.paste(tile, (size + _GAP + number % across * step, number // across * step))
    return canvas
