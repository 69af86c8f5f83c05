"""Image layout and pixels: the reference's numbers, and counts, gather index and tiles that cannot disagree."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from paddlemix.errors import UserError
from paddlemix.processors.images.image_spec import CLIP_MEAN, CLIP_STD, LLAVA_16_PINPOINTS, ImageSpec
from paddlemix.processors.images.tiles import image_tiles, preprocess_image
from paddlemix.processors.images.visual_tokens import (
    best_resolution,
    count_tiles,
    count_visual_tokens,
    grid_shape,
    visual_token_index,
)
from paddlemix.sample import NEWLINE_INDEX
from tests.tiny import ANYRES_SPEC, draw_picture, noise_picture

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "images.json").read_text(encoding="utf-8"))
LLAVA_16 = ImageSpec(aspect_mode="anyres", grid_pinpoints=LLAVA_16_PINPOINTS, merge_type="spatial_unpad")
SPECS = [
    ImageSpec(aspect_mode="square"),
    ImageSpec(aspect_mode="pad"),
    ImageSpec(aspect_mode="pad", cls_token=True),
    ImageSpec(aspect_mode="pad", merge_type="spatial_unpad"),
    replace(LLAVA_16, merge_type="flat"),
    replace(LLAVA_16, merge_type="flat", cls_token=True),
    replace(LLAVA_16, merge_type="spatial"),
    LLAVA_16,
    replace(LLAVA_16, grid_pinpoints=((336, 336), (672, 336), (1344, 1344))),
    replace(ANYRES_SPEC, grid_pinpoints=((84, 56), (28, 28))),
]
SIDES = st.integers(1, 4000)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['mode']}-{case['width']}x{case['height']}")
def test_golden_pixels(case: dict[str, Any]) -> None:
    spec = LLAVA_16 if case["mode"] == "anyres" else ImageSpec(aspect_mode=case["mode"])
    pixels = preprocess_image(draw_picture(case["width"], case["height"], case["seed"]), spec)
    if case["mode"] == "anyres":
        assert list(best_resolution(case["width"], case["height"], spec)) == case["best_resolution"]
        assert list(grid_shape(case["width"], case["height"], spec)) == case["grid_shape"]
        assert list(pixels.shape) == case["shape"]
    else:
        assert [1, *case["shape"]] == list(pixels.shape)
    assert pixels.dtype == np.float32
    exact = pixels.astype(np.float64)
    assert exact.mean() == pytest.approx(case["mean"], abs=1e-6)
    assert exact.std() == pytest.approx(case["std"], abs=1e-6)
    np.testing.assert_allclose(pixels.reshape(-1)[case["sample_index"]], case["sample_value"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("width", "height", "tokens"),
    [
        *[(336, 336, 1176), (640, 480, 2340), (480, 640, 2352), (1024, 899, 2634), (1920, 1080, 1948)],
        *[(1000, 1000, 2928), (328, 205, 926), (748, 352, 1800)],  # the last two: other roundings differ
    ],
)
def test_token_counts_of_llava_16(width: int, height: int, tokens: int) -> None:
    assert count_visual_tokens(width, height, LLAVA_16) == tokens


def test_token_counts_of_llava_15() -> None:
    for mode in ("square", "pad"):
        spec = ImageSpec(aspect_mode=mode)
        assert count_visual_tokens(640, 480, spec) == 576
        np.testing.assert_array_equal(visual_token_index(640, 480, spec), np.arange(576))
    assert count_visual_tokens(640, 480, ImageSpec(cls_token=True)) == 577


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.aspect_mode}-{spec.merge_type}-{spec.tokens_per_tile}")
@given(width=SIDES, height=SIDES)
@example(width=1, height=4000)
@example(width=4000, height=1)
@example(width=328, height=205)
@settings(max_examples=60)
def test_count_equals_index(spec: ImageSpec, width: int, height: int) -> None:
    index = visual_token_index(width, height, spec)
    assert index.dtype == np.int64
    assert count_visual_tokens(width, height, spec) == len(index)
    rows = index[index != NEWLINE_INDEX]
    assert rows.min() >= 0
    assert rows.max() < count_tiles(width, height, spec) * spec.tokens_per_tile
    assert len(np.unique(rows)) == len(rows)  # no feature twice
    np.testing.assert_array_equal(rows[: spec.tokens_per_tile], np.arange(spec.tokens_per_tile))  # whole image first


@given(width=SIDES, height=SIDES)
def test_one_newline_ends_each_row(width: int, height: int) -> None:
    index = visual_token_index(width, height, LLAVA_16)
    grid = index[LLAVA_16.tokens_per_tile :]
    ends = np.flatnonzero(grid == NEWLINE_INDEX)
    if len(grid) == 0:  # an extreme strip: its row is thinner than half a patch
        assert max(width, height) > 20 * min(width, height)
        return
    lengths = np.diff([-1, *ends])
    assert ends[-1] == len(grid) - 1
    assert (lengths == lengths[0]).all()
    assert len(ends) == len(grid) // lengths[0]
    across, down = grid_shape(width, height, LLAVA_16)
    assert len(ends) == down * 24 or lengths[0] - 1 == across * 24  # padding stands on two opposite sides only


def merge_as_written(width: int, height: int, spec: ImageSpec) -> list[int]:
    """The index spelled out cell by cell."""
    across, down = grid_shape(width, height, spec)
    side, per_tile = spec.patches_per_side, spec.tokens_per_tile
    top, left, cells_x, cells_y = 0, 0, across * side, down * side
    if spec.merge_type == "spatial_unpad" and width / height > cells_x / cells_y:
        top = (cells_y - int(height * (cells_x / width))) // 2
    elif spec.merge_type == "spatial_unpad":
        left = (cells_x - int(width * (cells_y / height))) // 2
    index = list(range(per_tile))
    for y in range(top, cells_y - top):
        for x in range(left, cells_x - left):
            tile = 1 + (y // side) * across + x // side
            index.append(tile * per_tile + (y % side) * side + x % side)
        index += [NEWLINE_INDEX] if spec.merge_type == "spatial_unpad" else []
    return index


@pytest.mark.parametrize("merge_type", ["spatial", "spatial_unpad"])
@given(width=st.integers(1, 300), height=st.integers(1, 300))
def test_index_equals_slow_version(merge_type: str, width: int, height: int) -> None:
    spec = replace(ANYRES_SPEC, merge_type=merge_type)
    assert visual_token_index(width, height, spec).tolist() == merge_as_written(width, height, spec)


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    short, long = min(image.size), max(image.size)
    new_long = int(size * long / short)
    resized = image.resize(
        (size, new_long) if image.width <= image.height else (new_long, size), Image.Resampling.BICUBIC
    )
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return resized.crop((left, top, left + size, top + size))


def tiles_as_written(image: Image.Image, spec: ImageSpec) -> list[np.ndarray]:
    """Tiles by whole resizes and numpy canvases."""
    size = spec.tile_size
    if spec.aspect_mode == "square":
        return [np.asarray(resize_and_crop(image, size))]
    if spec.aspect_mode == "pad":
        side = max(image.size)
        canvas = np.tile(np.array([int(255 * value) for value in spec.mean], dtype=np.uint8), (side, side, 1))
        paste(canvas, np.asarray(image))
        return [np.asarray(resize_and_crop(Image.fromarray(canvas), size))]
    width, height = best_resolution(*image.size, spec)
    scale_x, scale_y = width / image.width, height / image.height
    new_width = width if scale_x < scale_y else min(int(np.ceil(image.width * scale_y)), width)
    new_height = min(int(np.ceil(image.height * scale_x)), height) if scale_x < scale_y else height
    canvas = np.zeros((height, width, 3), dtype=np.uint8)
    paste(canvas, np.asarray(image.resize((new_width, new_height), Image.Resampling.BICUBIC)))
    tiles = [np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))]
    for row in range(height // size):
        tiles += [canvas[row * size : (row + 1) * size, x : x + size] for x in range(0, width, size)]
    return tiles


def paste(canvas: np.ndarray, pixels: np.ndarray) -> None:
    top, left = (canvas.shape[0] - pixels.shape[0]) // 2, (canvas.shape[1] - pixels.shape[1]) // 2
    canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels


@pytest.mark.parametrize("mode", ["square", "pad", "anyres"])
@given(width=st.integers(1, 1500), height=st.integers(1, 1500), seed=st.integers(0, 9))
@example(width=1, height=400, seed=0)
@example(width=400, height=1, seed=0)
@example(width=28, height=28, seed=0)
@settings(max_examples=25)
def test_tiles_equal_slow_version(mode: str, width: int, height: int, seed: int) -> None:
    spec = replace(ANYRES_SPEC, aspect_mode=mode)
    image = noise_picture(width, height, seed)
    tiles = image_tiles(image, spec)
    assert len(tiles) == count_tiles(width, height, spec)
    for tile, expected in zip(tiles, tiles_as_written(image, spec), strict=True):
        np.testing.assert_array_equal(np.asarray(tile), expected)


def test_normalisation() -> None:
    image = noise_picture(28, 28)
    pixels = preprocess_image(image, replace(ANYRES_SPEC, aspect_mode="pad"))
    expected = (np.asarray(image) / 255 - CLIP_MEAN) / CLIP_STD
    np.testing.assert_allclose(pixels, expected.transpose(2, 0, 1)[None], rtol=0, atol=1e-6)


def test_ties_go_to_the_grid_listed_first() -> None:
    assert best_resolution(300, 300, LLAVA_16) == (336, 672)
    turned = replace(LLAVA_16, grid_pinpoints=tuple(reversed(LLAVA_16_PINPOINTS[:2])))
    assert best_resolution(300, 300, turned) == (672, 336)


@pytest.mark.parametrize("spec", [SPECS[1], LLAVA_16], ids=["pad", "anyres"])
@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5)])
def test_side_of_zero(spec: ImageSpec, size: tuple[int, int]) -> None:
    for function in (count_visual_tokens, visual_token_index, count_tiles):
        with pytest.raises(UserError, match=f"{size[0]}x{size[1]}: both sides must be at least 1"):
            function(*size, spec)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"aspect_mode": "sqare"},
            r"image_aspect_ratio='sqare' is not one of square, pad, anyres; did you mean 'square'",
        ),
        ({"merge_type": "unpad"}, "mm_patch_merge_type='unpad' is not one of flat, spatial, spatial_unpad"),
        ({"tile_size": 10}, "image size 10 is smaller than one patch of 14"),
        ({"tile_size": 10, "patch_size": 0}, "smaller than one patch of 0"),
        ({"mean": (0.5, 0.5)}, r"image_mean \[0.5, 0.5\]"),
        ({"std": (0.5, 0.0, 0.5)}, "no deviation of 0"),
        ({"aspect_mode": "anyres"}, "'anyres' needs image_grid_pinpoints"),
        ({"aspect_mode": "anyres", "grid_pinpoints": ((300, 336),)}, r"\[300, 336\] is not a multiple of .* 336"),
        ({"aspect_mode": "anyres", "grid_pinpoints": ((0, 336),)}, r"\[0, 336\] is not a multiple"),
        (
            {"aspect_mode": "anyres", "grid_pinpoints": ((336, 336),), "merge_type": "spatial", "cls_token": True},
            "'spatial' has no place for class tokens",
        ),
    ],
)
def test_specification_that_is_not_allowed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ImageSpec(**values)
