"""Image files and URLs -> RGB images.

One function that either gives an RGB image or one clear error.  Knows no record and no model.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from paddlemix.errors import MissingFileError, UserError

_URL_TIMEOUT = (10, 30)  # seconds to connect, seconds between bytes
_MAX_URL_BYTES = 64 * 1024 * 1024
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


def is_url(path: str) -> bool:
    """Whether an image is named by an http(s) address."""
    return path.startswith(("http://", "https://"))


def load_image(path: str | Path) -> Image.Image:
    """Reads an image.

    Args:
        path: a file or an http(s) URL.

    Returns:
        RGB, turned upright by its EXIF orientation; transparency is dropped as the reference does, and of 16 bits the
        upper 8 are kept.

    Raises:
        MissingFileError: no such file.
        UserError: not an image, damaged, of 32-bit pixels, or the URL gives none.
    """
    name = str(path)
    source = io.BytesIO(_download(name)) if is_url(name) else _existing(name)
    with _decoder_errors(name), Image.open(source) as image:
        image.load()
        return _eight_bits(_upright(image), name).convert("RGB")


@contextmanager
def _decoder_errors(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"image '{name}' is not an image file that can be read") from error
    except Exception as error:  # the decoders raise whatever they trip over: all of it means a bad file
        raise UserError(f"image '{name}' is broken: {error}") from error


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
        raise UserError(f"image '{name}' has 32-bit pixels of unknown range; save it with 8 or 16 bits per channel")
    return image


def check_image(path: str) -> None:
    """Reads the header of an image file; a URL is left for later.

    Raises:
        MissingFileError, UserError: no such file, or not an image.
    """
    if is_url(path):
        return
    with _decoder_errors(path), Image.open(_existing(path)):
        pass


def _existing(name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise MissingFileError(f"image '{name}' {kind} (relative paths start from image_root, else from {Path.cwd()})")
    return path


def _download(url: str) -> bytes:
    import requests

    try:
        with requests.get(url, timeout=_URL_TIMEOUT, stream=True) as response:
            response.raise_for_status()
            content = bytearray()
            for chunk in response.iter_content(chunk_size=1 << 16):
                content += chunk
                if len(content) > _MAX_URL_BYTES:
                    raise UserError(f"image '{url}' is larger than {_MAX_URL_BYTES >> 20} MiB")
    except requests.RequestException as error:
        raise UserError(f"image '{url}' cannot be fetched: {error}") from error
    return bytes(content)
