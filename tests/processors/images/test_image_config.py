"""The image part of `processor_config.json`: it comes back as it was, and follows a tile of another size."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from paddlemix.errors import UserError
from paddlemix.processors.images.image_config import image_spec_from_dict, image_spec_to_dict, with_tile_size
from paddlemix.processors.images.image_spec import ImageSpec
from paddlemix.processors.images.tiles import image_tiles
from tests.tiny import noise_picture

SQUARE = ImageSpec(tile_size=28, aspect_mode="square")
SQUEEZED = replace(SQUARE, squash=True)


@pytest.mark.parametrize(
    "spec",
    [
        SQUARE,
        SQUEEZED,
        replace(SQUARE, resize_to=40, resample=2, rescale_factor=0.5, normalise=False, cls_token=True),
        ImageSpec(aspect_mode="anyres", grid_pinpoints=((336, 672),), merge_type="spatial_unpad"),
    ],
)
def test_a_spec_comes_back(spec: ImageSpec) -> None:
    again = image_spec_from_dict(json.loads(json.dumps(image_spec_to_dict(spec))))
    assert image_spec_to_dict(again) == image_spec_to_dict(spec) and again.resized_side == spec.resized_side


@pytest.mark.parametrize("tile", [14, 28, 56])
def test_squeezed_pictures_stay_squeezed_for_another_tile(tile: int) -> None:
    """What transformers' CLIPImageProcessor does with do_center_crop false and a size of that tile."""
    picture = noise_picture(50, 20)
    [found] = image_tiles(picture, image_spec_from_dict(with_tile_size(image_spec_to_dict(SQUEEZED), tile)))
    np.testing.assert_array_equal(np.asarray(found), picture.resize((tile, tile), Image.Resampling.BICUBIC))


def test_cropped_pictures_follow_the_tile() -> None:
    assert image_spec_from_dict(with_tile_size(image_spec_to_dict(SQUARE), 56)) == replace(SQUARE, tile_size=56)


@pytest.mark.parametrize("size", [{"shortest_edge": 40}, {"height": 40, "width": 40}])
def test_a_margin_around_the_tile_is_not_guessed(size: dict[str, Any]) -> None:
    values = {**image_spec_to_dict(SQUARE), "size": size}
    assert with_tile_size(values, 28) == values
    with pytest.raises(UserError, match=r"resized to 40 pixels before a tile of 28 is .* tiles of 56 \(vision"):
        with_tile_size(values, 56)
