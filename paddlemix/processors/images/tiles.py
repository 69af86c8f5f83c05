"""An image -> the normalised tiles that the vision tower reads, with PIL and numpy.

How many tiles there are and in which order is decided in `visual_tokens.py`.  Knows no file and no model.

Source: haotian-liu/LLaVA llava/mm_utils.py (commit c121f04); CLIPImageProcessor of transformers for resize, crop and
normalisation.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from paddlemix.processors.images.image_spec import ImageSpec
from paddlemix.processors.images.resample import FILTERS, resize_shortest_and_crop
from paddlemix.processors.images.visual_tokens import best_resolution


def image_tiles(image: Image.Image, spec: ImageSpec) -> list[Image.Image]:
    """Cuts an image into what the tower sees.

    Args:
        image: RGB, any size from 1x1.

    Returns:
        RGB images of `tile_size` squared; the whole image first, then the grid row by row.
    """
    size, resample = spec.tile_size, FILTERS[spec.resample]
    # aspect_mode     -> tiles
    # square, squash  -> one: both sides resized
    # square          -> one: the short side resized, the centre cut out
    # pad             -> one: a square of the mean colour around the picture
    # anyres          -> the whole picture squeezed into one, then the grid's tiles on black
    if spec.aspect_mode == "square" and spec.squash:
        return [_centre(image.resize((spec.resized_side, spec.resized_side), resample), size)]
    if spec.aspect_mode == "square":
        return [resize_shortest_and_crop(image, spec.resized_side, size, resample)]
    if spec.aspect_mode == "pad":
        return [_centre(_pad_and_resize(image, spec), size)]
    padded = _fit_into(image, best_resolution(*image.size, spec), resample)
    boxes = [
        (left, top, left + size, top + size)
        for top in range(0, padded.height, size)
        for left in range(0, padded.width, size)
    ]
    return [image.resize((size, size), resample), *(padded.crop(box) for box in boxes)]


def _centre(image: Image.Image, size: int) -> Image.Image:
    """The middle of a square."""
    start = (image.width - size) // 2
    return image if image.width == size else image.crop((start, start, start + size, start + size))


def _pad_and_resize(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """A square of the mean colour with the image in its centre, resized."""
    size, side, resample = spec.resized_side, max(image.size), FILTERS[spec.resample]
    colour = tuple(int(value * 255) for value in spec.mean)
    # rounds down as the reference does: an odd pixel of padding goes to the right and below
    offset = ((side - image.width) // 2, (side - image.height) // 2)
    if image.width > image.height:
        # Pillow resizes across, then down: across, the padding stays of one colour and needs no work.
        row = Image.new("RGB", (side, 1), colour).resize((size, 1), resample)
        canvas = Image.new("RGB", (size, side), row.getpixel((0, 0)))
        canvas.paste(image.resize((size, image.height), resample), (0, offset[1]))
    else:
        canvas = Image.new("RGB", (side, side), colour)
        canvas.paste(image, offset)
    return canvas.resize((size, size), resample)


def _fit_into(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """Resizes to fit and centres on black."""
    scale_x, scale_y = size[0] / image.width, size[1] / image.height
    if scale_x < scale_y:
        # ceil can exceed the canvas by one pixel
        fitted = (size[0], min(math.ceil(image.height * scale_x), size[1]))
    else:
        fitted = (min(math.ceil(image.width * scale_y), size[0]), size[1])
    canvas = Image.new("RGB", size, (0, 0, 0))
    resized = image.resize(fitted, resample)
    canvas.paste(resized, ((size[0] - fitted[0]) // 2, (size[1] - fitted[1]) // 2))
    return canvas


def normalise_tiles(tiles: list[Image.Image], spec: ImageSpec) -> np.ndarray:
    """Pixels of tiles as the tower reads them.

    Returns:
        float32 [N, 3, tile_size, tile_size], channels first, (value / 255 - mean) / std as CLIP has it.
    """
    size = spec.tile_size
    normalised = np.empty((len(tiles), 3, size, size), dtype=np.float32)
    for tile, planes in zip(tiles, normalised, strict=True):
        for channel, plane in enumerate(tile.split()):
            # "clip" only spares numpy a check: no byte is beyond 255
            np.take(spec._normalisation[channel], np.asarray(plane), out=planes[channel], mode="clip")
    return normalised


def preprocess_image(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Tiles of one RGB image, normalised: float32 [N, 3, tile_size, tile_size]."""
    return normalise_tiles(image_tiles(image, spec), spec)
