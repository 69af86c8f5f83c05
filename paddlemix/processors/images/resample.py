"""Resize the short side, crop the centre - in memory that does not grow with the aspect ratio.

A 1 x 20,000 image resized to a short side of 336 has 2.3 gigapixels of which 336 x 336 are kept.  For thin long strips
only the kept pixels are computed, with the same fixed-point arithmetic as Pillow, so that the result is equal bit for
bit.

Source: Pillow src/libImaging/Resample.c (bicubic with a = -0.5; 22 fractional bits); CLIPImageProcessor of transformers
for sizes and offsets.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

_STRIP_RATIO = 64  # beyond this aspect ratio, where the image also grows, only the kept pixels are computed
_FRACTION_BITS = 22
FILTERS = {1: Image.Resampling.LANCZOS, 2: Image.Resampling.BILINEAR, 3: Image.Resampling.BICUBIC}


def resize_shortest_and_crop(
    image: Image.Image, size: int, crop: int | None = None, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """Resizes so that the short side is `size` and keeps the centre square.

    Args:
        image: RGB, sides >= 1 pixel.
        size: short side after resizing, pixels.
        crop: side of the result, pixels, at most `size`; None: `size`.
        resample: one of `FILTERS`.
    """
    crop = size if crop is None else crop
    width, height = image.size
    short, long = min(width, height), max(width, height)
    new_long = int(size * long / short)
    resized = (size, new_long) if width <= height else (new_long, size)
    # ordinary pictures, and those that shrink -> Pillow
    # long thin ones that grow                 -> only the kept pixels
    if long <= _STRIP_RATIO * short or short >= size:
        if resized != image.size:
            image = image.resize(resized, resample)
    else:
        kept = ((new_long - crop) // 2, crop)
        strip = _tall_strip if width < height else _wide_strip
        image = strip(image, size, new_long, kept, resample)
    left, top = (image.width - crop) // 2, (image.height - crop) // 2
    return image.crop((left, top, left + crop, top + crop))


def _tall_strip(
    image: Image.Image, size: int, new_height: int, kept: tuple[int, int], resample: Image.Resampling
) -> Image.Image:
    """The kept rows, (first, how many), of a resized strip.  Pillow enlarges across first, then down."""
    weights, first = _weights(image.height, new_height, kept, resample)
    rows = image.crop((0, first, image.width, first + weights.shape[1]))
    across = rows.resize((size, rows.height), resample)
    return Image.fromarray(_apply(weights, np.asarray(across)))


def _wide_strip(
    image: Image.Image, size: int, new_width: int, kept: tuple[int, int], resample: Image.Resampling
) -> Image.Image:
    """The kept columns, (first, how many), of a resized strip."""
    weights, first = _weights(image.width, new_width, kept, resample)
    columns = image.crop((first, 0, first + weights.shape[1], image.height))
    across = _apply(weights, np.asarray(columns).transpose(1, 0, 2)).transpose(1, 0, 2)
    return Image.fromarray(np.ascontiguousarray(across)).resize((kept[1], size), resample)


def _apply(weights: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Fixed-point weighted sums along the first axis: [out, in] x uint8 [in, W, 3] -> uint8 [out, W, 3]."""
    # half a unit added before the shift: rounding, as in Pillow
    total = np.tensordot(weights, pixels.astype(np.int64), axes=1) + (1 << (_FRACTION_BITS - 1))
    return np.clip(total >> _FRACTION_BITS, 0, 255).astype(np.uint8)


def _weights(old: int, new: int, kept: tuple[int, int], resample: Image.Resampling) -> tuple[np.ndarray, int]:
    """Fixed-point weights of output positions offset .. offset + count - 1, `kept`, of an `old` -> `new` resize.

    Returns:
        int64 [count, span] over the source positions that are read, and the first of these positions."""
    (offset, count), (reach, curve) = kept, _CURVES[resample]
    scale = old / new
    filter_scale = max(scale, 1.0)
    support = reach * filter_scale
    rows: list[tuple[int, list[int]]] = []
    for position in range(offset, offset + count):
        centre = (position + 0.5) * scale
        start = max(int(centre - support + 0.5), 0)
        stop = min(int(centre + support + 0.5), old)
        values = [curve((source - centre + 0.5) * (1.0 / filter_scale)) for source in range(start, stop)]
        total = sum(values)
        # as Pillow: normalised in floating point, then rounded to fixed point; the last bit depends on it
        rows.append((start, [_to_fixed(value * (1.0 / total) if total else value) for value in values]))
    first = min(start for start, _ in rows)
    last = max(start + len(fixed) for start, fixed in rows)
    weights = np.zeros((count, last - first), dtype=np.int64)
    for index, (start, fixed) in enumerate(rows):
        weights[index, start - first : start - first + len(fixed)] = fixed
    return weights, first


def _bicubic(x: float) -> float:
    x = abs(x)
    if x < 1.0:
        return ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1
    if x < 2.0:
        return (((x - 5) * x + 8) * x - 4) * -0.5
    return 0.0


def _bilinear(x: float) -> float:
    return max(1.0 - abs(x), 0.0)


def _lanczos(x: float) -> float:
    return _sinc(x) * _sinc(x / 3) if -3.0 <= x < 3.0 else 0.0


def _sinc(x: float) -> float:
    return 1.0 if x == 0.0 else math.sin(x * math.pi) / (x * math.pi)


# filter -> how far it reaches, source pixels, and its weight at a distance
_CURVES: dict[Image.Resampling, tuple[float, Callable[[float], float]]] = {
    Image.Resampling.LANCZOS: (3.0, _lanczos),
    Image.Resampling.BILINEAR: (1.0, _bilinear),
    Image.Resampling.BICUBIC: (2.0, _bicubic),
}


def _to_fixed(value: float) -> int:
    return int(value * (1 << _FRACTION_BITS) + (0.5 if value >= 0 else -0.5))
