"""Where things that can be made again are kept between runs: indices of data files, image sizes, downloaded images.

Knows no content.  Everything below the folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from paddlemix.errors import UserError
from paddlemix.paths import user_path
from paddlemix.temporary import temporary_file


def cache_directory(kind: str) -> Path:
    """The folder for one kind of cached files, made where it is missing.

    Args:
        kind: name of a subfolder, e.g. "records".

    Returns:
        `$PADDLEMIX_CACHE/kind`, else `$XDG_CACHE_HOME/paddlemix/kind`, else `~/.cache/paddlemix/kind`.

    Raises:
        UserError: the folder cannot be made.
    """
    own = os.environ.get("PADDLEMIX_CACHE")
    # PADDLEMIX_CACHE is the folder itself; in the shared places of the XDG specification ours is a folder among others.
    base = user_path(own or os.environ.get("XDG_CACHE_HOME") or "~/.cache", "the cache folder (PADDLEMIX_CACHE)")
    directory = (base if own else base / "paddlemix") / kind
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache folder {directory} cannot be made: {error.strerror}; set PADDLEMIX_CACHE to another folder"
        ) from error
    return directory


def cache_key(*parts: object) -> str:
    """A file name's stem, 32 hexadecimal digits, that differs where any part's text differs."""
    # 128 bits of SHA-256: equal keys by chance are out of the question, and the name stays short.
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()[:32]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well; a failed block leaves nothing.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    try:
        with temporary_file(path) as temporary:
            yield temporary
            os.replace(temporary, path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
