"""Why a data file is not an array of records: found by reading it again, slowly, from the first doubtful byte.

Only for files that are wrong; names line and column as `json` does.  Knows no conversations.
"""

from __future__ import annotations

import json
import os
from typing import Any

from paddlemix.datasets.records.json_values import DECODER, not_an_object, undecodable
from paddlemix.datasets.records.scan import first_solid, line_and_column
from paddlemix.errors import UserError

_WINDOW_BYTES = 64 * 1024  # of a record, at first
_UNDECIDED = 16  # characters: an error this near to the window's end may be the end's own


class ArrayReader:
    """Reads an array item by item until something is wrong.

    Args:
        descriptor: of the open file.
        path: its name for messages.
        begin: the first byte of its text, after a byte order mark.
    """

    def __init__(self, descriptor: int, path: str, begin: int) -> None:
        self._descriptor = descriptor
        self._path = path
        self._begin = begin

    def explain(self, place: int, number: int) -> UserError:
        """The first error from a place on.

        Args:
            place: the byte after record `number` - 1, or after the array's bracket.
            number: of the record that comes next.

        Returns:
            An error that names line and column, or the record that is not an object.
        """
        try:
            while True:
                start = self._start_of_item(place, number)
                value, place = self._decode(start)
                if not isinstance(value, dict):
                    return UserError(f"{self._path} record {number}: {not_an_object(value)}")
                number += 1
        except UserError as error:
            return error

    def _start_of_item(self, place: int, number: int) -> int:
        found, code = self._next(place)
        if code == b"]":
            found, code = self._next(found + 1)
            if code:
                raise self._error(found, "Extra data")
            raise UserError(f"data file '{self._path}' changed while it was read; start again")
        if number and code != b",":
            raise self._error(found, "Expecting ',' delimiter")
        if number:
            found, code = self._next(found + 1)
        if code in (b"", b"]"):
            raise self._error(found, "Expecting value")
        return found

    def _next(self, place: int) -> tuple[int, bytes]:
        """The next byte that is not white space and its place; b"" and the file's size at its end."""
        found = first_solid(self._descriptor, place)
        return (self._size(), b"") if found is None else (found, os.pread(self._descriptor, 1, found))

    def _decode(self, start: int) -> tuple[Any, int]:
        """The value that begins at a byte, and the byte after it."""
        size = _WINDOW_BYTES
        while True:
            # A record of unknown length: a window that grows until the record ends inside it.
            window = os.pread(self._descriptor, size, start)
            text, is_whole = self._decode_text(window, start)
            is_end = len(window) < size
            try:
                value, length = DECODER.raw_decode(text)
                return value, start + len(text[:length].encode())
            except json.JSONDecodeError as error:
                # an error near the end of a window may only mean that the window ends there
                cut_short = error.msg.startswith("Unterminated string") or error.pos > len(text) - _UNDECIDED
                if not cut_short or (is_end and is_whole):
                    raise self._error(start + len(text[: error.pos].encode()), error.msg) from error
                if not is_whole:
                    raise self._not_unicode(start + len(text.encode())) from error
            except (RecursionError, ValueError) as error:
                raise self._error(start, undecodable(error)) from error
            # grows fast: a record of many megabytes is read a few times, not thousands of times
            size *= 4

    def _decode_text(self, window: bytes, start: int) -> tuple[str, bool]:
        """The text of a window up to what is not UTF-8, and whether there is none such; a character cut off at the
        window's end does not count."""
        try:
            return window.decode("utf-8"), True
        except UnicodeDecodeError as error:
            cut_off = error.reason == "unexpected end of data" and start + len(window) < self._size()
            return window[: error.start].decode("utf-8"), cut_off

    def _size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def _not_unicode(self, place: int) -> UserError:
        return UserError(f"data file '{self._path}' is not UTF-8 (byte {place}); save it as UTF-8")

    def _error(self, place: int, message: str) -> UserError:
        line, column = line_and_column(self._descriptor, self._begin, place)
        return UserError(f"data file '{self._path}' is not JSON: line {line}, column {column}: {message}")
