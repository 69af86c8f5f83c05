"""One reader of JSON files that somebody else wrote: limited in size and depth, no key twice, one clear error.

    values = read_object(path)  # a JSON object, UTF-8 with or without a byte order mark

Knows no key.  What keys of a declared file may be is said in `declared.py`.
"""

from __future__ import annotations

import json
import os
import select
import stat
from pathlib import Path
from typing import Any

from paddlemix.errors import MissingFileError, UserError
from paddlemix.lfs import refuse_pointer_content

MAX_BYTES = 64 * 1024**2  # of a file; the index of a model with a million tensors is smaller
MAX_DEPTH = 64  # objects and lists inside each other
_PIPE_SECONDS = 10.0  # for which a pipe may stay silent
_SHOWN = 60  # characters of a value in an error


class _Repeated(ValueError):
    """A key that occurs twice in an object, with different values."""


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """The text of a file, UTF-8 with or without a byte order mark.

    Args:
        limit: most bytes.

    Raises:
        MissingFileError: there is no such file, or it cannot be read.
        UserError: it is longer than `limit`, is not UTF-8, or is a pipe into which nobody writes.
    """
    try:
        # a pipe without a writer would block forever
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            content = _read_limited(descriptor, limit, path)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise MissingFileError(f"'{path}' does not exist") from None
    except IsADirectoryError:
        raise UserError(f"'{path}' is a folder, expected a file") from None
    except OSError as error:
        raise MissingFileError(f"'{path}' cannot be read: {error.strerror}") from None
    refuse_pointer_content(content, f"'{path}'")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _read_limited(descriptor: int, limit: int, path: Path) -> bytes:
    mode = os.fstat(descriptor).st_mode
    waits = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
    # Sizes are counted while reading: a pipe has none, and a file may grow meanwhile.
    pieces: list[bytes] = []
    size = 0
    while size <= limit:
        if waits and not select.select([descriptor], [], [], _PIPE_SECONDS)[0]:
            raise UserError(f"'{path}' is a pipe, and nothing was written to it for {_PIPE_SECONDS:.0f} s")
        piece = os.read(descriptor, min(1 << 20, limit + 1 - size))
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)
        size += len(piece)
    raise UserError(f"'{path}' is longer than {limit:,} bytes, the limit for such a file; is it the right file?")


def parse_json(text: str, repeats: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        repeats: whether a key may occur twice with different values; the last one then counts.

    Raises:
        json.JSONDecodeError: it is not JSON.
        UserError: an object has a key twice with different values, it is deeper than `MAX_DEPTH`, or a number has
            thousands of digits.
    """
    try:
        # Python takes the last of two equal keys.  In a hand-edited config.json the first one is as likely to be meant.
        value = json.loads(text, object_pairs_hook=None if repeats else _without_repeats)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise UserError(f"objects and lists are nested deeper than {MAX_DEPTH}") from None
    except _Repeated as error:
        raise UserError(f"the key '{error}' occurs twice with different values; remove one") from None
    except ValueError as error:
        raise UserError(f"not JSON: {error}") from None
    _check_depth(value)
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        for key, value in pairs:
            if values[key] != value:
                raise _Repeated(key)
    return values


def _check_depth(value: Any) -> None:
    # Level by level instead of by recursion, which would fail on the very files that this refuses.
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for item in level:
            children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
            inner += [child for child in children if isinstance(child, dict | list)]
        if not inner:
            return
        level = inner
    raise UserError(f"objects and lists are nested deeper than {MAX_DEPTH}")


def read_object(path: Path, limit: int = MAX_BYTES) -> dict[str, Any]:
    """A file's JSON object unchanged, null included: to be edited and written again, or for `take`.

    Raises:
        MissingFileError: there is no such file, or it cannot be read.
        UserError: it is not a JSON object, or is beyond what `read_text` and `parse_json` allow.
    """
    text = read_text(path, limit)
    try:
        values = parse_json(text)
    except json.JSONDecodeError as error:
        raise UserError(f"'{path}' is not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except UserError as error:
        raise UserError(f"'{path}': {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"'{path}' must hold a JSON object, not {describe(values)}")
    return values


def describe(value: Any) -> str:
    """A JSON value in an error: cut short, and its kind where that could be missed ("40" is a text)."""
    try:
        shown = json.dumps(value, ensure_ascii=True, default=repr)
    except (ValueError, RecursionError):
        shown = "a value"
    shown = shown if len(shown) <= _SHOWN else shown[:_SHOWN] + " ..."
    kinds = ((str, " (text)"), (list, " (a list)"), (dict, " (an object)"))
    return shown + next((kind for item, kind in kinds if isinstance(value, item)), "")
