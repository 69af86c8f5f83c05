"""Image files and URLs -> RGB images.

One function that either gives an RGB image or one clear error.  Knows no record and no model.
"""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from paddlemix.errors import MissingFileError, UserError

_URL_TIMEOUT = (10, 30)  # seconds to connect, seconds between bytes
_MAX_URL_BYTES = 64 * 1024 * 1024


def is_url(path: str) -> bool:
    """Whether an image is named by an http(s) address."""
    return path.startswith(("http://", "https://"))


def load_image(path: str | Path) -> Image.Image:
    """Reads an image.

    Args:
        path: a file or an http(s) URL.

    Returns:
        RGB, turned upright by its EXIF orientation; transparency is dropped as the reference does.

    Raises:
        MissingFileError: no such file.
        UserError: not an image, damaged, or the URL gives none.
    """
    name = str(path)
    source = io.BytesIO(_download(name)) if is_url(name) else _existing(name)
    try:
        with Image.open(source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError as error:
        raise UserError(f"image '{name}' is not an image file that can be read") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"image '{name}' is broken: {error}") from error


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
