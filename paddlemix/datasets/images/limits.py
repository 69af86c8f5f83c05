"""What decoding a picture may cost: formats, seconds, memory; known before a decoder begins, or stopped as it reads.

A few kilobytes can describe a picture that costs a decoder minutes or gigabytes.  Pixels are limited by `max_pixels`;
here is what pixels do not tell.  Times were measured with Pillow 13 on one core.

Sources: ITU-T T.81 (JPEG: scans), the Netpbm documentation (PNM headers and comments), Pillow's decoders.
"""

from __future__ import annotations

import io
import os
import re
import time
from typing import IO, Any, BinaryIO, cast

from PIL import Image

from paddlemix.errors import UserError

# What is decoded.  EPS is here to be known and refused; MPO comes with JPEG.
_ALLOWED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "ICNS", "TGA", "EPS")
Image.init()  # Pillow knows no format by name before
FORMATS = tuple(name for name in _ALLOWED if name in Image.OPEN)
_SHORT = 1024**2  # bytes; no decoder reads a shorter file for long, and most pictures are shorter
_SECONDS = 20.0  # of processor time, while the decoder still reads
# Of JPEG 2000: a decoder needs about 28 bytes a pixel, 11 million pixels and 2.6 MB of file cost a second.
_JPEG2000_SHARE = 8  # times fewer pixels than `max_pixels`
_JPEG2000_BYTES = 32 * 1024**2
_SCANS = 100  # of a progressive JPEG; encoders write about ten, and each costs a pass over all pixels
_CHEAP_PIXELS = 1_000_000  # below, scans do not count
_PNM_HEADER = 4096  # bytes
_PLAIN_PNM = 256 * 1024  # bytes of one with its numbers as text; 80 KB of comments in it cost a second
_PNM = re.compile(rb"P[1-7][\s#]")
_PNM_NUMBERS = re.compile(rb"P\d(?:\s|#[^\r\n]*[\r\n])+(?:\d+(?:\s|#[^\r\n]*[\r\n])+){2}")
# A comment can be read in one way only: otherwise a few dozen of them would keep the search busy for ever.
_SVG = re.compile(rb"(?:\xef\xbb\xbf)?(?:\s|<\?xml[^>]*>|<!--(?:(?!-->).)*-->|<!DOCTYPE[^>]*>)*<svg[\s>]", re.DOTALL)
_now = time.thread_time


def timed(file: BinaryIO | IO[bytes], name: str) -> IO[bytes]:
    """A file that stops whoever reads it when too much of the processor's time has gone; a short one is not watched.

    Args:
        file: read through; it is not closed with this one.
        name: of the picture, for the error.

    Returns:
        A file whose `read` raises a `UserError` then.
    """
    return cast(IO[bytes], _TimedFile(file, name) if _size(file) > _SHORT else file)


class _TimedFile(io.RawIOBase):
    """See `timed`."""

    def __init__(self, file: BinaryIO | IO[bytes], name: str) -> None:
        super().__init__()
        self._file, self._name = file, name
        self._end = _now() + _SECONDS

    def read(self, count: int | None = -1) -> bytes:
        if _now() > self._end:
            raise UserError(f"image '{self._name}' takes more than {_SECONDS:g} s to decode; save it as PNG or JPEG")
        return self._file.read(-1 if count is None else count)

    def seek(self, place: int, whence: int = 0) -> int:
        return self._file.seek(place, whence)

    def tell(self) -> int:
        return self._file.tell()

    def fileno(self) -> int:
        return self._file.fileno()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def check_beginning(file: BinaryIO | IO[bytes], name: str) -> None:
    """Refuses by its first bytes what no decoder should begin with; the file is at its start before and after.

    Raises:
        UserError: SVG, or a PNM file whose header or numbers would be read for ever.
    """
    start = file.read(_PNM_HEADER)
    file.seek(0)
    if _SVG.match(start):
        raise UserError(f"image '{name}' is SVG, a drawing without pixels; save it as PNG")
    if _PNM.match(start):
        if start[1:2] != b"7" and not _PNM_NUMBERS.match(start):
            raise UserError(f"image '{name}' has a PNM header of more than {_PNM_HEADER:,} bytes; save it as PNG")
        size = _size(file)
        if start[1:2] in b"123" and size > _PLAIN_PNM:
            raise UserError(
                f"image '{name}' has its pixels as {size:,} bytes of text, more than {_PLAIN_PNM:,}; save it as PNG"
            )


def check_cost(image: Image.Image, file: BinaryIO | IO[bytes], name: str, max_pixels: int) -> None:
    """Refuses a picture whose decoding costs more than its pixels tell.

    Args:
        image: its header is read.
        file: the picture's; where it is read does not change.
        name: for the error.
        max_pixels: limit of formats that decode in one pass.

    Raises:
        UserError: it costs too much.
    """
    pixels = image.width * image.height
    if image.format == "JPEG2000":
        if pixels > max_pixels // _JPEG2000_SHARE:
            raise UserError(
                f"image '{name}' has {pixels:,} pixels in JPEG 2000, which takes {_JPEG2000_SHARE} times the memory of "
                f"other formats: {max_pixels // _JPEG2000_SHARE:,} are allowed; save it as PNG or JPEG, make it "
                f"smaller or raise max_image_pixels ({max_pixels})"
            )
        size = _size(file)
        if size > _JPEG2000_BYTES:
            raise UserError(
                f"image '{name}' is larger than {_JPEG2000_BYTES >> 20} MiB in JPEG 2000, which is slow to decode: "
                f"{size:,} bytes; save it as PNG or JPEG"
            )
    if image.format in ("JPEG", "MPO") and pixels > _CHEAP_PIXELS and _is_progressive(image):
        scans = _count_scans(file)
        if scans > _SCANS:
            raise UserError(f"image '{name}' is a JPEG of {scans} scans, {_SCANS} are allowed; save it again")


def _is_progressive(image: Image.Image) -> bool:
    information: dict[Any, Any] = image.info
    return bool(information.get("progressive") or information.get("progression"))


def _size(file: BinaryIO | IO[bytes]) -> int:
    return file.getbuffer().nbytes if isinstance(file, io.BytesIO) else os.fstat(file.fileno()).st_size


def _count_scans(file: BinaryIO | IO[bytes]) -> int:
    """Marks that begin a scan (FF DA); inside of a scan's data FF is never followed by DA."""
    place = file.tell()
    file.seek(0)
    count, last = 0, b""
    try:
        while piece := file.read(1 << 20):
            count += (last + piece).count(b"\xff\xda")
            last = piece[-1:]
        return count
    finally:
        file.seek(place)
