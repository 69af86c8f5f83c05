"""Pictures of tiles: the bytes that went into the normalisation, each tile in its place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from paddlemix.errors import UserError
from paddlemix.processors.images.drawing import denormalise_tiles, draw_tiles
from paddlemix.processors.images.image_spec import ImageSpec
from paddlemix.processors.images.tiles import image_tiles, normalise_tiles, preprocess_image
from paddlemix.processors.images.visual_tokens import grid_shape
from tests.tiny import ANYRES_SPEC, PAD_SPEC, noise_picture


@pytest.mark.parametrize("spec", [PAD_SPEC, ANYRES_SPEC, replace(PAD_SPEC, mean=(0.5,) * 3, std=(0.5,) * 3)])
def test_every_byte_comes_back(spec: ImageSpec) -> None:
    tiles = image_tiles(noise_picture(70, 40), spec)
    expected = np.stack([np.asarray(tile) for tile in tiles])
    np.testing.assert_array_equal(denormalise_tiles(normalise_tiles(tiles, spec), spec), expected)


def test_one_tile_is_the_picture() -> None:
    image = noise_picture(28, 28)
    drawn = draw_tiles(preprocess_image(image, PAD_SPEC), (1, 1), PAD_SPEC)
    np.testing.assert_array_equal(np.asarray(drawn), np.asarray(image))


def test_the_whole_image_stands_left_of_its_grid() -> None:
    image = noise_picture(100, 30)
    grid = grid_shape(*image.size, ANYRES_SPEC)
    assert grid == (3, 1)
    tiles = image_tiles(image, ANYRES_SPEC)
    drawn = np.asarray(draw_tiles(preprocess_image(image, ANYRES_SPEC), grid, ANYRES_SPEC))
    assert drawn.shape == (28, 28 + 8 + 3 * 28 + 2 * 2, 3)
    for number, left in enumerate((0, 36, 66, 96)):
        np.testing.assert_array_equal(drawn[:, left : left + 28], np.asarray(tiles[number]))


def test_wrong_number_of_tiles() -> None:
    with pytest.raises(UserError, match="3 tiles cannot be drawn as a grid of 2 x 2"):
        draw_tiles(np.zeros((3, 3, 28, 28), dtype=np.float32), (2, 2), ANYRES_SPEC)
