"""What an image is named by -> its bytes: a path, an http(s) address or a `data:` URI.

Size is limited before anything is read into memory.  Knows no image format.
"""

from __future__ import annotations

import base64
import binascii
import errno
import io
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

from paddlemix.errors import MissingFileError, UserError
from paddlemix.lfs import refuse_pointer_content
from paddlemix.network.client import RemoteSettings
from paddlemix.network.fetch import cached, fetch

MAX_PIXELS = 178_956_970  # Pillow's own limit, above which it refuses
_DATA_URI = re.compile(r"data:(?P<type>[^;,]*)(?P<options>(?:;[^;,]*)*),", re.IGNORECASE)
_SCHEME = re.compile(r"(?:^|/)([A-Za-z][A-Za-z0-9+.\-]+)://")  # image_root may precede it
_BEGINNING = 64  # bytes that tell a pointer of git-lfs
_SHOWN = 200  # characters of a path that an error repeats
_SHOWN_DATA = 40  # of a data URI


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """Limits on images.

    Args:
        max_bytes: largest file, download or decoded `data:` URI.
        max_pixels: largest width times height; above Pillow's 178,956,970 Pillow's own limit is raised.
        timeout, retries, allow_local_network, offline: of downloads, see `RemoteSettings`.
    """

    max_bytes: int = 64 * 1024**2
    max_pixels: int = MAX_PIXELS
    timeout: float = 30.0
    retries: int = 3
    allow_local_network: bool = False
    offline: bool | None = None

    @property
    def remote(self) -> RemoteSettings:
        """Those of a download."""
        return RemoteSettings(
            timeout=self.timeout,
            retries=self.retries,
            max_bytes=self.max_bytes,
            allow_local_network=self.allow_local_network,
            offline=self.offline,
            limit_name="max_image_bytes",
        )


def is_url(path: str) -> bool:
    """Whether an image is named by an http(s) address."""
    return path[:8].lower().startswith(("http://", "https://"))


def is_data_uri(path: str) -> bool:
    """Whether an image is spelled out in its own name, `data:image/png;base64,...`."""
    return path[:5].lower() == "data:"


def shown(name: str) -> str:
    """An image's name as an error repeats it: the first 40 characters of a `data:` URI, 200 of a path."""
    limit = _SHOWN_DATA if is_data_uri(name) else _SHOWN
    return name if len(name) <= limit else f"{name[:limit]}..."


def check_bytes(name: str, num_bytes: int, settings: ImageSettings) -> None:
    """Raises a `UserError` where an image's file has more bytes than `max_bytes`."""
    limit = settings.max_bytes
    if num_bytes > limit:
        text = f"{limit >> 20} MiB" if limit >= 1 << 20 else f"{limit} bytes"
        raise UserError(
            f"image '{shown(name)}' is larger than {text}: {num_bytes:,} bytes; make it smaller or raise "
            f"max_image_bytes ({limit})"
        )


def files_of(names: Iterable[str]) -> list[str]:
    """The files that hold images: paths themselves, cached files of addresses; "" for an address that was not fetched
    yet and a `data:` URI."""
    places = [cached(name) if is_url(name) else None if is_data_uri(name) else name for name in names]
    return ["" if place is None else str(place) for place in places]


def local_path(name: str, settings: ImageSettings) -> str:
    """The file that holds an image: a path itself, the cached file of an address, which is fetched where needed.

    Raises:
        UserError: the address has none.
    """
    if not is_url(name):
        return name
    try:
        return str(fetch(name, settings.remote))
    except UserError as error:
        raise UserError(f"image {error}") from error


@contextmanager
def open_content(name: str, settings: ImageSettings) -> Iterator[BinaryIO]:
    """The bytes of an image as a file, positioned at its start.

    Raises:
        MissingFileError: no such file, or it cannot be read.
        UserError: more bytes than allowed, a broken `data:` URI, or the address has nothing.
    """
    if is_data_uri(name):
        yield io.BytesIO(_decode_uri(name, settings))
        return
    with _open_file(local_path(name, settings), name) as file:
        check_bytes(name, os.fstat(file.fileno()).st_size, settings)
        refuse_pointer_content(file.read(_BEGINNING), f"image '{shown(name)}'")
        file.seek(0)
        yield file


def _open_file(path: str, name: str) -> BinaryIO:
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode):
            return open(path, "rb")
    except (OSError, ValueError) as error:  # ValueError: a zero character in the path
        raise _missing_file(name, error) from error
    # A pipe would wait for ever.
    kind = "is a folder" if stat.S_ISDIR(status.st_mode) else "is not a file but a device or a pipe"
    raise MissingFileError(f"image '{shown(name)}' {kind} {_start()}")


def _missing_file(name: str, error: OSError | ValueError) -> UserError:
    scheme = _SCHEME.search(name)
    if scheme is not None and not is_url(name):
        return UserError(
            f"image '{shown(name)}' cannot be fetched: {scheme[1]}:// is not supported; use http://, https:// or data:"
        )
    if isinstance(error, (FileNotFoundError, NotADirectoryError)) or not isinstance(error, OSError):
        return MissingFileError(f"image '{shown(name)}' does not exist {_start()}")
    if error.errno == errno.ENAMETOOLONG:
        return MissingFileError(
            f"image '{shown(name)}' is too long for a path; one in base64 begins with data:image/png;base64,"
        )
    return MissingFileError(f"image '{shown(name)}' cannot be read: {error.strerror}")


def _start() -> str:
    return f"(relative paths start from the image root if one is set, otherwise from {Path.cwd()})"


def _decode_uri(uri: str, settings: ImageSettings) -> bytes:
    """The bytes that a `data:` URI holds.  Source: RFC 2397."""
    found = _DATA_URI.match(uri)
    if found is None:
        raise UserError(f"image '{shown(uri)}' is not a data URI; one begins with data:image/png;base64,")
    kind = found["type"].strip().lower()
    if not kind.startswith("image/") and kind != "application/octet-stream":
        raise UserError(f"image '{shown(uri)}' holds '{kind or 'text/plain'}', expected image/png or the like")
    encoded = ";base64" in found["options"].lower()
    check_bytes(uri, (len(uri) - found.end()) // 4 * 3 - 2 if encoded else 0, settings)
    try:
        content = unquote_to_bytes(uri[found.end() :])
        if encoded:
            content = base64.b64decode(b"".join(content.split()), validate=True)
    except (binascii.Error, UnicodeError) as error:
        raise UserError(f"image '{shown(uri)}' is not base64 throughout: {error}") from error
    check_bytes(uri, len(content), settings)
    return content
