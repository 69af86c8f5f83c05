"""The one rule for paths that users and files name: `~` is a home folder, and what no file system can hold is refused.

Every path of a command line, a configuration or another settings file goes through `user_path`, or `user_place` where
an address or a model's name is allowed too.  Nothing here reads the disk.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from paddlemix.errors import UserError

MAX_NAME, MAX_PATH = 255, 4095  # bytes.  Source: Linux limits.h, NAME_MAX and PATH_MAX without its closing NUL
_ADDRESS = re.compile(r"data:|[A-Za-z][A-Za-z0-9+.\-]+://", re.IGNORECASE)
_SHOWN = 80  # characters of a path that an error repeats


def user_path(text: str | os.PathLike[str], what: str) -> Path:
    """The path that a user means.

    Args:
        text: as it was given; `~` and `~name` at its start are home folders.
        what: the flag or key it was given for, for messages: "--output", "output_dir".

    Raises:
        UserError: it is empty, an address, has a NUL byte, is not valid Unicode, is longer than a file system allows,
            or names a home folder that does not exist.
    """
    given = os.fspath(text)
    if is_address(given) and "://" in given:
        raise UserError(f"{what} '{shown_path(given)}' is an address; name a path on this machine")
    return Path(_expanded(given, what))


def user_place(text: str, what: str) -> str:
    """The path, address or name that a user means, as text.

    Args:
        text: an http(s) address, `data:` text and a name like `owner/model` come back unchanged; a path as of
            `user_path`, but "./" in front, which distinguishes a folder from a name, stays.
        what: see `user_path`.

    Raises:
        UserError: see `user_path`.
    """
    if is_address(text):
        return text
    return _expanded(text, what)


def is_address(text: str) -> bool:
    """Whether a text is `data:...` or an address with its scheme, like https://host/name, and no path."""
    return _ADDRESS.match(text) is not None


def _expanded(text: str, what: str) -> str:
    # An empty path would mean the working folder.
    if not text:
        raise UserError(f"{what} is empty; name a path ('.' is the working folder)")
    if "\0" in text:
        raise UserError(f"{what} '{shown_path(text)}' has a NUL byte, which no path may have; correct it")
    # Python keeps bytes that are not UTF-8 as lone surrogates.  Such a path works on the disk, but no JSON file and no
    # log could repeat it.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} '{shown_path(text)}' is not valid Unicode (character {error.start} is half of a pair, or a byte "
            "that is not UTF-8); rename it, or correct the text"
        ) from None
    # Unchanged for a name that has no home folder.
    path = os.path.expanduser(text)
    # `expanduser` returns a name without a home folder unchanged, and a folder called "~name" would be made silently.
    if text.startswith("~") and path == text:
        raise UserError(
            f"{what} '{shown_path(text)}': {text.partition('/')[0]} has no home folder; write "
            f"'./{shown_path(text)}' for a name that begins with ~"
        )
    _check_length(path, what)
    return path


def _check_length(path: str, what: str) -> None:
    longest = max((len(name.encode()) for name in path.split("/")), default=0)
    if longest > MAX_NAME:
        raise UserError(f"{what} '{shown_path(path)}' has a name of {longest} bytes; at most {MAX_NAME} are allowed")
    if len(path.encode()) > MAX_PATH:
        size = len(path.encode())
        raise UserError(f"{what} '{shown_path(path)}' is {size} bytes long; at most {MAX_PATH} are allowed")


def shown_path(text: str) -> str:
    """A path as errors show it: one line, at most 80 characters of it."""
    line = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text[:_SHOWN])
    return line if len(text) <= _SHOWN else f"{line}..."
