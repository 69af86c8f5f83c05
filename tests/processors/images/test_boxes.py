"""Boxes as text: the coordinates of what the model sees, checked against the pixels that it is shown."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from paddlemix.errors import UserError
from paddlemix.processors.images.boxes import box_text, write_boxes
from paddlemix.processors.images.image_spec import ImageSpec
from paddlemix.processors.images.tiles import image_tiles
from paddlemix.processors.text.conversation import render
from paddlemix.processors.text.known_templates import get_template
from paddlemix.processors.text.tokenizer import Tokenizer
from paddlemix.sample import Box, Message, Sample
from tests.tiny import ANYRES_SPEC, PAD_SPEC, make_processor, noise_picture

SQUARE_SPEC = replace(PAD_SPEC, aspect_mode="square", tile_size=336)
SPECS = {"pad": PAD_SPEC, "anyres": ANYRES_SPEC, "square": SQUARE_SPEC}


@pytest.mark.parametrize(
    ("mode", "size", "text"),
    [
        ("anyres", (640, 480), "[0.1, 0.1, 0.5, 0.5]"),
        ("pad", (640, 480), "[0.1, 0.2, 0.5, 0.5]"),  # 80 pixels above, of 640
        ("pad", (480, 640), "[0.23, 0.07, 0.62, 0.38]"),  # 80 pixels to the left
        ("pad", (500, 500), "[0.13, 0.1, 0.64, 0.48]"),
        ("square", (640, 480), "[0.0, 0.1, 0.5, 0.5]"),  # 80 pixels cut away at the left
    ],
)
def test_coordinates_follow_the_mode(mode: str, size: tuple[int, int], text: str) -> None:
    assert box_text(Box(0, (64, 48, 320, 240)), size, SPECS[mode]) == text


@pytest.mark.parametrize("mode", list(SPECS))
def test_shares_of_the_sides_are_the_same_box(mode: str) -> None:
    pixels, shares = Box(0, (64, 48, 320, 240)), Box(0, (0.1, 0.1, 0.5, 0.5), normalised=True)
    assert box_text(shares, (640, 480), SPECS[mode]) == box_text(pixels, (640, 480), SPECS[mode])


@given(
    width=st.integers(40, 400),
    height=st.integers(40, 400),
    corners=st.tuples(*[st.floats(0, 1)] * 4),
    mode=st.sampled_from(list(SPECS)),
)
def test_the_box_is_where_the_model_sees_it(
    width: int, height: int, corners: tuple[float, float, float, float], mode: str
) -> None:
    """A white box is drawn into a black image; the white pixels of the first tile are where the text says."""
    left, right = sorted(int(corner * width) for corner in corners[:2])
    top, bottom = sorted(int(corner * height) for corner in corners[2:])
    right, bottom = max(right, left + 15), max(bottom, top + 15)
    if right > width or bottom > height:
        return
    spec = replace(SPECS[mode], mean=(0.0, 0.0, 0.0), tile_size=280, grid_pinpoints=((280, 560), (560, 280)))
    image = Image.new("RGB", (width, height))
    image.paste((255, 255, 255), (left, top, right, bottom))
    seen = np.asarray(image_tiles(image, spec)[0])[..., 0] > 127
    if not seen.any():
        return
    across, down = np.flatnonzero(seen.any(axis=0)), np.flatnonzero(seen.any(axis=1))
    found = np.array([across[0], down[0], across[-1] + 1, down[-1] + 1]) / spec.tile_size
    written = json.loads(box_text(Box(0, (left, top, right, bottom)), (width, height), spec))
    np.testing.assert_allclose(written, found, atol=0.011)


def test_numbers_are_written_as_in_the_training_data() -> None:
    assert box_text(Box(0, (0, 0.4, 100, 299.9)), (1000, 300), ANYRES_SPEC) == "[0.0, 0.0, 0.1, 1.0]"
    assert box_text(Box(0, (-0.9, -0.5, 10, 10.5)), (10, 10), ANYRES_SPEC) == "[0.0, 0.0, 1.0, 1.0]"


@pytest.mark.parametrize(
    ("box", "spec", "message"),
    [
        (Box(0, (0, 0, 102, 10)), PAD_SPEC, "the box [0, 0, 102, 10] (in pixels) lies outside of image 0, 100x50"),
        (Box(0, (0, -2, 10, 10)), ANYRES_SPEC, "lies outside of image 0, 100x50 pixels upright"),
        (Box(0, (0, 0, 10, 60)), SQUARE_SPEC, "lies outside of image 0"),
        (Box(0, (0, 0, 1.2, 0.5), True), PAD_SPEC, "the box [0, 0, 1.2, 0.5] (as shares of its sides) lies outside"),
        (Box(0, (0, 0, 20, 10)), SQUARE_SPEC, "outside of the centre of image 0 (100x50) that image_aspect_ratio"),
        (Box(0, (80, 0, 100, 10)), SQUARE_SPEC, "outside of the centre of image 0 (100x50)"),
    ],
)
def test_box_that_lies_outside(box: Box, spec: ImageSpec, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        box_text(box, (100, 50), spec)


SAMPLE = Sample(
    messages=(
        Message(role="user", content=(0, 1, "What is at ", Box(1, (0, 0, 10, 20)), "?")),
        Message(role="assistant", content=("A bus, ", Box(0, (5, 5, 10, 10)))),
    ),
    images=("a.png", "b.png"),
    source="train.json record 0",
)
SIZES = [(10, 20), (20, 40)]


def test_messages_without_boxes_stay_the_same() -> None:
    messages = (Message(role="user", content=(0, "Q")),)
    assert write_boxes(messages, SIZES, PAD_SPEC) is messages


def test_processor_writes_boxes(tokenizer: Tokenizer) -> None:
    processor = make_processor(tokenizer, ANYRES_SPEC)
    written = write_boxes(SAMPLE.messages, SIZES, ANYRES_SPEC)
    assert written[0].content[-3:] == ("What is at ", "[0.0, 0.0, 0.5, 0.5]", "?")
    assert written[1].text == "A bus, [0.5, 0.25, 1.0, 0.5]"
    images = [noise_picture(*size) for size in SIZES]
    ids = processor.encode(SAMPLE, images).input_ids
    np.testing.assert_array_equal(ids, processor.encode_text(written, SIZES).input_ids)
    np.testing.assert_array_equal(ids, processor.encode_text(SAMPLE.messages, SIZES).input_ids)
    assert processor.measure(SAMPLE, SIZES)[0] == len(ids)
    prompt = processor.encode_prompt(SAMPLE.messages[:1], images).input_ids
    np.testing.assert_array_equal(ids[: len(prompt)], prompt)
    processor.check(SAMPLE)


def test_box_error_names_the_sample(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"^train.json record 0: the box \[0, 0, 10, 20\] .* image 1, 5x5 pixels"):
        make_processor(tokenizer).measure(SAMPLE, [(10, 20), (5, 5)])


def test_a_box_is_never_left_out_silently() -> None:
    with pytest.raises(UserError, match="is not text yet"):
        render(get_template("vicuna_v1"), SAMPLE.messages)
