"""What kind of file a data file is, from its first bytes: a JSON array, JSON Lines, or something to be refused."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from paddlemix.datasets.records.json_values import DECODER, json_kind
from paddlemix.datasets.records.scan import Spans, first_solid
from paddlemix.errors import UserError

_MARK = b"\xef\xbb\xbf"  # UTF-8's byte order mark, as Windows editors write it
_LOOKED_AT = 4096  # bytes, to name what the file holds instead of records

# First bytes -> what the file is and what to do.
_FOREIGN = (
    (b"\x1f\x8b", "is compressed with gzip; unpack it with gunzip"),
    (b"BZh", "is compressed with bzip2; unpack it with bunzip2"),
    (b"\xfd7zXZ", "is compressed with xz; unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd; unpack it with unzstd"),
    (b"PK\x03\x04", "is a zip archive; unpack it with unzip"),
    (
        b"PAR1",
        "is a Parquet file; write its rows as JSON Lines (pandas: to_json(orient='records', lines=True))",
    ),
    (b"\xff\xfe", "is UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16; save it as UTF-8"),
    (b"[\x00", "is UTF-16; save it as UTF-8"),
    (b"{\x00", "is UTF-16; save it as UTF-8"),
    (b"\x00[", "is UTF-16; save it as UTF-8"),
    (b"\x00{", "is UTF-16; save it as UTF-8"),
    (b"<", "begins like a web page or XML"),
)


@dataclass(frozen=True)
class Layout:
    """How a file is to be read.

    Args:
        is_array: a JSON array, else JSON Lines.
        begin: the first byte of the text, after a byte order mark.
        inside: the first byte that may belong to a record.
    """

    is_array: bool
    begin: int
    inside: int


def recognise(descriptor: int, name: str) -> Layout:
    """Tells a JSON array from JSON Lines by the first byte that is not white space.

    Args:
        descriptor: of the open file.
        name: of the file in messages.

    Raises:
        UserError: it is neither; names what it is.
    """
    head = os.pread(descriptor, 16, 0)
    begin = len(_MARK) if head.startswith(_MARK) else 0
    first = first_solid(descriptor, begin)
    # nothing but white space, or nothing at all
    if first is None:
        raise UserError(f"data file '{name}' holds no record: it is empty")
    # before anything is parsed: a compressed file of gigabytes would else be searched for brackets
    for magic, problem in _FOREIGN:
        if head.startswith(magic) or (magic == b"<" and os.pread(descriptor, 1, first) == magic):
            raise UserError(f"data file '{name}' {problem}; expected a JSON array of records or JSON Lines")
    code = os.pread(descriptor, 1, first)
    if code == b"[":
        # what the first solid byte tells:  [ an array   { JSON Lines   anything else is refused
        return Layout(True, begin, first + 1)
    if code == b"{":
        return Layout(False, begin, begin)
    raise UserError(f"data file '{name}' {_neither(descriptor, first)}")


def _neither(descriptor: int, first: int) -> str:
    expected = "expected an array of records or JSON Lines"
    text = os.pread(descriptor, _LOOKED_AT, first).decode("utf-8", "replace")
    try:
        return f"holds a JSON {json_kind(DECODER.raw_decode(text)[0])}, {expected}"
    except ValueError:
        return f"is not JSON: it begins with {text[:20]!r}, {expected}; for a table there is `paddlemix convert-data`"


def check_lines(descriptor: int, name: str, spans: Spans) -> None:
    """Checks by its first line that a file which begins with an object continues as JSON Lines.

    Args:
        descriptor: of the open file.
        name: of the file in messages.
        spans: the first lines.

    Raises:
        UserError: an object is spread over lines.
    """
    start, end = int(spans.starts[0]), int(spans.ends[0])
    following = first_solid(descriptor, end)
    # one line, or a next line that begins an object as well: JSON Lines
    if following is None or os.pread(descriptor, 1, following) == b"{":
        return
    text = os.pread(descriptor, end - start, start).decode("utf-8", "replace").rstrip()
    try:
        DECODER.decode(text)
    except json.JSONDecodeError as error:
        if error.pos >= len(text):
            raise UserError(
                f"data file '{name}' holds an object that is spread over lines; put the records into an array, "
                "[{...}, {...}], or each on a line of its own"
            ) from error
    except (ValueError, RecursionError):  # a record that cannot be used: the check of all records reports it
        return
