"""The strip path gives Pillow's own pixels, bit for bit, and stays small where Pillow would not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from paddlemix.processors.images import resample
from paddlemix.processors.images.resample import resize_shortest_and_crop
from tests.tiny import draw_picture, noise_picture


def by_pillow(image: Image.Image, size: int) -> np.ndarray:
    """The whole image resized, then cropped."""
    short, long = min(image.size), max(image.size)
    new_long = int(size * long / short)
    tall = image.width <= image.height
    resized = image.resize((size, new_long) if tall else (new_long, size), Image.Resampling.BICUBIC)
    offset = (new_long - size) // 2
    return np.asarray(resized.crop((0, offset, size, offset + size) if tall else (offset, 0, offset + size, size)))


@pytest.mark.parametrize("turned", [False, True], ids=["tall", "wide"])
@given(short=st.integers(1, 4), ratio=st.integers(65, 300), extra=st.integers(0, 3), size=st.integers(5, 24))
@settings(max_examples=40)
def test_strip_equals_pillow(turned: bool, short: int, ratio: int, extra: int, size: int) -> None:
    long = short * ratio + extra
    image = noise_picture(*((long, short) if turned else (short, long)), seed=long)
    np.testing.assert_array_equal(np.asarray(resize_shortest_and_crop(image, size)), by_pillow(image, size))


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (3, 1000)])
def test_long_strip_equals_pillow_at_small_tiles(size: tuple[int, int]) -> None:
    image = noise_picture(*size)
    np.testing.assert_array_equal(np.asarray(resize_shortest_and_crop(image, 20)), by_pillow(image, 20))


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 64), (64, 1), (2, 200), (90, 17), (336, 336), (28, 28), (40, 3000), (28, 30)]
)
def test_other_shapes_equal_pillow(size: tuple[int, int]) -> None:
    image = draw_picture(*size, seed=1)
    np.testing.assert_array_equal(np.asarray(resize_shortest_and_crop(image, 28)), by_pillow(image, 28))


@pytest.mark.parametrize("turned", [False, True], ids=["tall", "wide"])
def test_strip_path_equals_the_plain_one_at_any_ratio(monkeypatch: pytest.MonkeyPatch, turned: bool) -> None:
    """The limit is a matter of memory alone: below it both ways give the same."""
    image = noise_picture(*((50, 7) if turned else (7, 50)))
    expected = np.asarray(resize_shortest_and_crop(image, 20))
    monkeypatch.setattr(resample, "_STRIP_RATIO", 1)
    np.testing.assert_array_equal(np.asarray(resize_shortest_and_crop(image, 20)), expected)


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1)])
def test_extreme_strip_stays_small(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    """Resized whole it would have 336 x 6,720,000 pixels."""
    image, resize = noise_picture(*size), Image.Image.resize

    def resize_small(self: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
        assert size[0] * size[1] <= 336 * 400
        return resize(self, size, resample)

    monkeypatch.setattr(Image.Image, "resize", resize_small)
    assert resize_shortest_and_crop(image, 336).size == (336, 336)
