"""Images by path, http(s) address or `data:` URI -> RGB images, or one clear error.

An image's pixels are limited before it is decoded, and its size is known from its header alone.  Knows no record and
no model.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from paddlemix.datasets.images.limits import FORMATS, check_beginning, check_cost, timed
from paddlemix.datasets.images.sources import MAX_PIXELS, ImageSettings, check_bytes, is_url, open_content, shown
from paddlemix.errors import UserError
from paddlemix.network.fetch import content_type, discard
from paddlemix.network.switches import offline_switch

# Source: EXIF 2.3, tag Orientation
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
# Formats whose header says how large the loaded image is; of the others some hold several sizes.
_SIZE_IN_HEADER = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
_TEXT_WITH_ORIENTATION = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_DEFAULTS = ImageSettings()

# `max_pixels` replaces Pillow's warning, which comes at half of Pillow's limit.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def load_image(path: str | Path, settings: ImageSettings = _DEFAULTS) -> Image.Image:
    """Reads an image.

    Args:
        path: a file, an http(s) address or a `data:` URI.
        settings: limits.

    Returns:
        RGB, turned upright by its EXIF orientation; the first frame of an animation; transparency is dropped as the
        reference does, and of 16 bits the upper 8 are kept.

    Raises:
        MissingFileError: no such file, or it cannot be read.
        UserError: not an image, damaged, of 32-bit pixels, too large, or the address has none.
    """
    name = str(path)
    with _open(name, settings) as image:
        image.load()
        return _eight_bits(_upright(image), name).convert("RGB")


def image_size(path: str | Path, settings: ImageSettings = _DEFAULTS) -> tuple[int, int]:
    """Width and height, in pixels, of what `load_image` returns, from the header alone.

    The file of an address is fetched where it is not in the cache.

    Raises:
        MissingFileError, UserError: as `load_image`; damage after the header is not seen.
    """
    with _open(str(path), settings) as image:
        if image.format not in _SIZE_IN_HEADER:
            image.load()
        width, height = image.size
        # Pillow turns TIFF by itself: its size is already that of the turned picture.
        sideways = image.format != "TIFF" and _header_orientation(image) in _SIDEWAYS
        return (height, width) if sideways else (width, height)


def check_limits(path: str | Path, num_bytes: int, size: tuple[int, int], settings: ImageSettings) -> None:
    """Holds an image that is known already against the limits.

    Args:
        path: for the error.
        num_bytes: size of its file.
        size: width and height, pixels.
        settings: limits.

    Raises:
        UserError: a limit is exceeded.
    """
    check_bytes(str(path), num_bytes, settings)
    _check_pixels(str(path), size, settings)


def _check_pixels(name: str, size: tuple[int, int], settings: ImageSettings) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise UserError(f"image '{shown(name)}' is broken: its size is {width} x {height} pixels")
    if width * height > settings.max_pixels:
        raise UserError(
            f"image '{shown(name)}' has {width * height:,} pixels ({width} x {height}); make it smaller or raise "
            f"max_image_pixels ({settings.max_pixels})"
        )


@contextmanager
def _open(name: str, settings: ImageSettings) -> Iterator[Image.Image]:
    """An image whose header is read and within the limits; what the block raises comes out as `UserError` too."""
    if settings.max_pixels > MAX_PIXELS and Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, settings.max_pixels)
    with _decoder_errors(name, settings), open_content(name, settings) as file:
        check_beginning(file, shown(name))
        with Image.open(timed(file, shown(name)), formats=FORMATS) as image:
            if image.format == "EPS":  # would start Ghostscript
                raise UserError(f"image '{shown(name)}' is PostScript, which is a program; save it as PNG or JPEG")
            _check_pixels(name, image.size, settings)
            check_cost(image, file, shown(name), settings.max_pixels)
            yield image


@contextmanager
def _decoder_errors(name: str, settings: ImageSettings) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except UnidentifiedImageError as error:
        message = f"image '{shown(name)}' is not an image file that can be read"
        if is_url(name):
            message += f"; its server sent '{content_type(name) or 'no content type'}'"
            if offline_switch(settings.offline) is None:
                discard(name)  # a page of an error or a login, in whose place the image may be another time
        raise UserError(message) from error
    except Exception as error:  # the decoders raise whatever they trip over: all of it means a bad file
        raise UserError(f"image '{shown(name)}' is broken: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF is common in collected photos and says nothing about the pixels
        turn = None
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Pillow's own conversion would cut every value above 255 to white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UserError(
            f"image '{shown(name)}' has 32-bit pixels of unknown range; save it with 8 or 16 bits per channel"
        )
    return image


def _header_orientation(image: Image.Image) -> object:
    """The orientation that `_upright` goes by, without decoding the image where that is possible."""
    try:
        if image.format == "PNG" and isinstance(image, ImageFile.ImageFile):
            if "exif" not in image.info and image.fp is not None and _has_late_orientation(image.fp):
                image.load()
            return Image.Image.getexif(image).get(ExifTags.Base.Orientation)  # PNG's own method would decode first
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # see `_upright`
        return None


def _has_late_orientation(file: IO[bytes]) -> bool:
    """Whether a PNG may have its orientation after its pixels.  Source: PNG 1.2, sections 3.2 and 4.2.3."""
    position, place, after_pixels = file.tell(), 8, False
    try:
        while len(start := _read_at(file, place, 40)) >= 8:
            length, kind = int.from_bytes(start[:4], "big"), start[4:8]
            after_pixels = after_pixels or kind == b"IDAT"
            named = kind in _TEXT_CHUNKS and start[8:].startswith(_TEXT_WITH_ORIENTATION)
            if after_pixels and (kind == b"eXIf" or named):
                return True
            place += length + 12
        return False
    finally:
        file.seek(position)


def _read_at(file: IO[bytes], place: int, count: int) -> bytes:
    try:
        return os.pread(file.fileno(), count, place)  # a seek would read a whole buffer at each of many chunks
    except (AttributeError, OSError):  # not on this system, or in memory
        file.seek(place)
        return file.read(count)
