"""Pointers of git-lfs: what a clone has in place of a large file until `git lfs pull` brings it.

Source: git-lfs's specification of pointer files, docs/spec.md.
"""

from __future__ import annotations

import os
from pathlib import Path

from paddlemix.errors import UserError

_BEGINNING = b"version https://git-lfs.github.com/spec/"
_LONGEST = 1024  # bytes; a pointer is shorter


def refuse_pointer(path: str | Path, what: str) -> None:
    """Checks a file that may be a pointer; one that does not exist or cannot be read is left to its reader.

    Args:
        path: of the file; only the beginning of a small one is read.
        what: the file, for the message, e.g. "data file 'train.json'".

    Raises:
        UserError: it is a pointer.
    """
    try:
        # Size first, so that a file of gigabytes is not opened for this; a pointer is about 130 bytes.
        if os.path.isfile(path) and os.stat(path).st_size < _LONGEST:
            with open(path, "rb") as file:
                refuse_pointer_content(file.read(len(_BEGINNING)), what)
    except OSError:
        return


def refuse_pointer_content(beginning: bytes, what: str) -> None:
    """The same for the first bytes of a file, at least 40."""
    if beginning.startswith(_BEGINNING):
        raise UserError(
            f"{what} is a git-lfs pointer, not the file itself; run `git lfs pull` in its repository, or download it"
        )
