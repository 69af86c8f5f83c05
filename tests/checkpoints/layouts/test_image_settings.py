"""preprocessor_config.json: what transformers' image processors compute from it, or an error that names the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor
from transformers.models.llava.image_processing_llava import LlavaImageProcessor
from transformers.models.llava_next.image_processing_llava_next import LlavaNextImageProcessor

from paddlemix.checkpoints.convert.declared_files import tower_preprocessor
from paddlemix.checkpoints.layouts.image_settings import read_pixels
from paddlemix.errors import UserError
from paddlemix.processors.images.image_config import image_spec_from_dict, pixel_options
from paddlemix.processors.images.image_spec import ImageSpec, parse_pinpoints
from paddlemix.processors.images.tiles import preprocess_image
from tests.tiny import draw_picture

SIZES = [
    (100, 60),
    (70, 50),
    (41, 90),
    (28, 28),
    (33, 600),
    (5, 400),
    (400, 5),
]  # a side of 1 or 3 would be taken for channels
SQUARE = {"height": 32, "width": 32}
PLAIN: dict[str, Any] = {"crop_size": {"height": 28, "width": 28}, "size": {"shortest_edge": 28}}


def spec_of(directory: Path, declared: dict[str, Any], mode: str) -> ImageSpec:
    (directory / "preprocessor_config.json").write_text(json.dumps(declared))
    usual = {"image_size": 28, "patch_size": 14, "image_aspect_ratio": mode, "image_mean": [0.5] * 3}
    return image_spec_from_dict({**usual, "image_std": [0.5] * 3, **read_pixels(directory)})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"resample": 2},
        {"resample": 1},
        {"size": {"shortest_edge": 40}},
        {"size": {"shortest_edge": 40}, "resample": 2},
        {"size": 33},
        {"size": SQUARE},
        {"size": SQUARE, "do_center_crop": False, "crop_size": None},
        {"rescale_factor": 0.0125},
        {"do_rescale": False, "do_normalize": False},
        {"do_normalize": False},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.5, 0.25, -0.5]},
    ],
)
@pytest.mark.parametrize("kind", [CLIPImageProcessor, LlavaImageProcessor, LlavaNextImageProcessor])
def test_pixels_are_those_of_transformers(tmp_path: Path, kind: Any, changes: dict[str, Any]) -> None:
    more: dict[str, Any] = {LlavaImageProcessor: {"do_pad": True}}.get(kind, {})
    if kind is LlavaNextImageProcessor:
        more = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}
    theirs = kind(**{**PLAIN, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], **more, **changes})
    mode = {CLIPImageProcessor: "square", LlavaImageProcessor: "pad"}.get(kind, "anyres")
    declared = json.loads(theirs.to_json_string())
    if kind is LlavaNextImageProcessor and "size" in changes:
        with pytest.raises(
            UserError, match="unlike crop_size 28 is not supported|is not a multiple of the image size 32"
        ):
            spec_of(tmp_path, declared, mode)
        return
    spec = spec_of(tmp_path, declared, mode)
    for width, height in SIZES:
        image = draw_picture(width, height, 0)
        if kind is LlavaNextImageProcessor and (width == height or min(width, height) < 28):
            continue  # a tie, which transformers resolves by (height, width); a strip that becomes one pixel wide
        expected = theirs(image, return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(preprocess_image(image, spec), expected.reshape(-1, *expected.shape[-3:]))


@pytest.mark.parametrize("resample", [1, 2, 3])
@pytest.mark.parametrize("size", [(1, 400), (400, 1), (2, 500), (3, 211)])
def test_a_strip_is_resized_as_pillow_does(size: tuple[int, int], resample: int) -> None:
    """Where only the kept pixels are computed, they are Pillow's."""
    image = draw_picture(*size, 1)
    spec = ImageSpec(tile_size=28, aspect_mode="square", resize_to=30, resample=resample, normalise=False)
    width, height = (30, int(30 * size[1] / size[0])) if size[0] < size[1] else (int(30 * size[0] / size[1]), 30)
    whole = image.resize((width, height), Image.Resampling(resample))
    left, top = (width - 28) // 2, (height - 28) // 2
    expected = np.asarray(whole.crop((left, top, left + 28, top + 28))).transpose(2, 0, 1)
    np.testing.assert_array_equal(np.rint(preprocess_image(image, spec)[0] * 255), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_resize": False}, "do_resize is false; supported: true"),
        ({"do_center_crop": False}, "do_center_crop is false with size {'shortest_edge': 28}"),
        ({"resample": 0}, "resample is 0; allowed: 1, 2, 3"),
        ({"resample": "3"}, r'resample is "3" \(text\)'),
        ({"size": {"shortest_edge": 20}}, "size 20 is smaller than the 28 pixels"),
        ({"size": {"height": 28, "width": 30}}, "size is .*; supported: a number"),
        ({"size": {"longest_edge": 30}}, "size is .*; supported: a number"),
        ({"size": "28"}, r'size is "28" \(text\); allowed'),
        ({"crop_size": {"height": 28.5, "width": 28}}, "crop_size: height is 28.5"),
        ({"image_std": [float("nan")] * 3}, r"image_std is \[NaN, NaN, NaN\]"),
        ({"image_std": [0.5, 0, 0.5]}, r"image_std is \[0.5, 0, 0.5\]"),
        ({"image_mean": "0.5"}, "image_mean is"),
        ({"image_processor_type": "SiglipImageProcessor"}, "image_processor_type is .*others resize in other ways"),
        ({"do_normalize": "no"}, "do_normalize is"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        spec_of(tmp_path, {**PLAIN, **changes}, "square")


def test_do_pad_decides_where_the_class_has_it(tmp_path: Path) -> None:
    for declared, mode in [
        ({"image_processor_type": "LlavaImageProcessor", "do_pad": False}, "square"),
        ({"image_processor_type": "LlavaImageProcessor", "do_pad": True}, "pad"),
        ({"image_processor_type": "CLIPImageProcessor", "do_pad": False}, None),
        ({"image_processor_type": "LlavaImageProcessorFast", "do_pad": None}, None),
    ]:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PLAIN, **declared}))
        assert read_pixels(tmp_path).get("image_aspect_ratio") == mode


def test_what_is_read_is_written_again(tmp_path: Path) -> None:
    """In our own processor_config.json and in the preprocessor_config.json of the other layouts."""
    for changes in ({}, {"size": SQUARE}, {"size": 40, "resample": 2}, {"rescale_factor": 0.5, "do_normalize": False}):
        spec = spec_of(tmp_path, {**PLAIN, **changes}, "square")
        values = {"image_size": 28, "image_mean": list(spec.mean), "image_std": list(spec.std), **pixel_options(spec)}
        again = tower_preprocessor(values)
        assert spec_of(tmp_path, again, "square") == spec
        assert bool(pixel_options(spec)) is bool(changes)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ()),
        ([[336, 672]], ((336, 672),)),
        ("[(336, 672), (672, 336)]", ((336, 672), (672, 336))),
        ("[[336,672]]", ((336, 672),)),
        # Source: LLaVA-NeXT mm_utils.py: all grids from the first to the last, the second number fastest
        ("(1x1),...,(2x3)", ((336, 336), (336, 672), (336, 1008), (672, 336), (672, 672), (672, 1008))),
        ("(1x1),(1x2)", ((336, 336), (336, 672))),
        ("(2x2)", ((672, 672),)),
    ],
)
def test_grids_in_every_form(value: Any, expected: tuple[tuple[int, int], ...]) -> None:
    assert parse_pinpoints(value, 336) == expected


@pytest.mark.parametrize("value", ["", "(3x3),...,(1x1)", "(1x1),...,(999x999)", "(0x1)", "[(1, 2)", "print(1)"])
def test_grids_in_no_form(value: str) -> None:
    with pytest.raises(UserError, match="image_grid_pinpoints .* is not a list"):
        parse_pinpoints(value, 336)


def test_anyres_max_is_not_anyres() -> None:
    with pytest.raises(UserError, match="'anyres_max_9' is not one of .*'anyres' neither") as error:
        ImageSpec(aspect_mode="anyres_max_9")
    assert "did you mean" not in str(error.value)
