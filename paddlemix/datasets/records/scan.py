"""Where the records of a JSON array or of JSON Lines begin and end: one pass over the bytes, nothing held.

An array is cut by its brackets outside texts, lines at their ends; both are found for a whole block at once.  Only on
right JSON is a span one record: whoever decodes it learns the rest.  Knows no JSON values and no records.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BLOCK_BYTES = 4 * 1024**2  # read at once; larger ones are not faster
WHITE = b" \t\n\r"  # Source: RFC 8259, section 2

_QUOTE, _BACKSLASH, _NEWLINE = b'"\\\n'
_CONTINUATION = bytes(range(0x80, 0xC0))  # UTF-8: of a character's bytes all but the first
_STRUCTURE = bytes(byte in b'"[]{}' for byte in range(256))  # table for bytes.translate


@dataclass(frozen=True)
class Spans:
    """Neighbouring records.

    Args:
        previous: the byte where the record before the first one ends, or where the file's first one may begin.
        starts, ends: int64 [k], bytes of the file.
        lines: int64 [k], 1-based line of each record of JSON Lines; None for an array.
        scanned: bytes of the file that are done.
        closed: the byte after the bracket that closes the array, in its last spans.
    """

    previous: int
    starts: np.ndarray
    ends: np.ndarray
    lines: np.ndarray | None
    scanned: int
    closed: int | None = None


def scan_array(descriptor: int, start: int) -> Iterator[Spans]:
    """Items of an array that are objects or arrays.

    Args:
        descriptor: of the open file.
        start: the byte after the array's first bracket.

    Returns:
        The items in order; spans may be empty.  What is between items is not checked.  Without `closed` in the
        last spans the file ends within the array.
    """
    scanner = _ArrayScanner()
    previous, opened = start, np.empty(0, np.int64)
    for block, offset in _blocks(descriptor, start, split_escapes=False):
        starts, ends, closed = scanner.feed(block, offset)
        opened = np.concatenate([opened, starts])
        yield Spans(previous, opened[: len(ends)], ends, None, offset + len(block), closed)
        opened = opened[len(ends) :]
        previous = int(ends[-1]) if len(ends) else previous
        if closed is not None:
            return


class _ArrayScanner:
    """Depth of brackets and whether a text is open, from block to block."""

    def __init__(self) -> None:
        self._depth = 0  # open brackets inside the array
        self._in_text = 0  # 1 inside quotes

    def feed(self, block: bytes, offset: int) -> tuple[np.ndarray, np.ndarray, int | None]:
        """Starts and ends of items in a block that does not end in a backslash, and the byte after the array."""
        places = np.flatnonzero(np.frombuffer(block.translate(_STRUCTURE), bool))
        codes = np.frombuffer(block, np.uint8)
        places = _without_escaped(codes, places)
        kinds = codes[places]
        is_quote = kinds == _QUOTE
        # after an odd number of quotes a byte is inside a text; brackets there are characters
        in_text = (np.cumsum(is_quote) + self._in_text) & 1
        self._in_text = int(in_text[-1]) if len(in_text) else self._in_text
        brackets = ~is_quote & (in_text == 0)
        places, kinds = places[brackets], kinds[brackets]
        steps = (kinds & 2).astype(np.int64) - 1  # bit 1 is set in [ and {, not in ] and }
        # depth 1 is reached where an item opens, 0 where it closes, -1 where the array itself closes
        depths = np.cumsum(steps) + self._depth
        self._depth = int(depths[-1]) if len(depths) else self._depth
        closings = np.flatnonzero(depths == -1)
        if len(closings):
            places, steps, depths = (values[: closings[0] + 1] for values in (places, steps, depths))
        starts = places[(depths == 1) & (steps == 1)] + offset
        ends = places[(depths == 0) & (steps == -1)] + offset + 1
        return starts, ends, int(places[-1]) + offset + 1 if len(closings) else None


def _without_escaped(codes: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Drops the places that follow an odd number of backslashes."""
    slashes = np.flatnonzero(codes == _BACKSLASH)
    if not len(slashes):
        return places
    last = np.flatnonzero(np.append(np.diff(slashes) != 1, True))  # of each run of backslashes
    lengths = np.diff(last, prepend=-1)
    escaped = np.zeros(len(codes) + 1, bool)
    # of a run of backslashes each second one is escaped itself: an odd run escapes what follows it
    escaped[slashes[last[lengths % 2 == 1]] + 1] = True
    return places[~escaped[places]]


def scan_lines(descriptor: int, start: int) -> Iterator[Spans]:
    """Lines that hold more than white space; spans may be empty.

    Args:
        descriptor: of the open file.
        start: the first byte.
    """
    line_start, line, solid = start, 1, False  # of the line that the block before left open
    end = start
    for block, offset in _blocks(descriptor, start):
        stops = np.flatnonzero(np.frombuffer(block, np.uint8) == _NEWLINE) + offset
        starts = np.append(line_start, stops + 1)
        numbers = np.arange(line, line + len(starts))
        full = _solid_lines(block, offset, starts, stops)
        full[0] |= solid
        previous, end = line_start, offset + len(block)
        line_start, line, solid = int(starts[-1]), int(numbers[-1]), bool(full[-1])
        kept = np.flatnonzero(full[:-1])
        yield Spans(previous, starts[kept], stops[kept], numbers[kept], end)
    if solid:
        yield Spans(line_start, np.array([line_start]), np.array([end]), np.array([line]), end)


def _solid_lines(block: bytes, offset: int, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """bool [lines]: which lines, the open one at the end too, hold more than white space within the block."""
    firsts, lasts = np.maximum(starts - offset, 0), np.append(stops - offset, len(block))
    full = ~np.isin(np.frombuffer(block + b"\n", np.uint8)[firsts], np.frombuffer(WHITE, np.uint8))
    for index in np.flatnonzero(~full):  # few lines begin with white space
        full[index] = bool(block[firsts[index] : lasts[index]].strip(WHITE))
    return full


def first_solid(descriptor: int, start: int, end: int | None = None) -> int | None:
    """Place of the first byte from `start`, and before `end`, that is not white space; None without one."""
    for block, offset in _blocks(descriptor, start, end):
        rest = block.lstrip(WHITE)
        if rest:
            return offset + len(block) - len(rest)
    return None


def line_and_column(descriptor: int, start: int, place: int) -> tuple[int, int]:
    """Line and character of a byte, both 1-based, counted from the byte `start` on."""
    line, column = 1, 1
    for block, _ in _blocks(descriptor, start, place):
        line += block.count(b"\n")
        last = block.rfind(b"\n") + 1
        characters = len(block[last:].translate(None, _CONTINUATION))
        column = characters + (1 if last else column)
    return line, column


def _blocks(
    descriptor: int, start: int, end: int | None = None, split_escapes: bool = True
) -> Iterator[tuple[bytes, int]]:
    """The file from `start` to `end` in blocks and their places; on wish backslashes at an end go into the next one."""
    held, offset = b"", start
    while read := os.pread(descriptor, _next_size(offset + len(held), end), offset + len(held)):
        block = held + read
        kept = len(block) if split_escapes else len(block.rstrip(b"\\"))
        held = block[kept:]
        if kept:
            yield block[:kept], offset
        offset += kept
    if held:
        yield held, offset


def _next_size(place: int, end: int | None) -> int:
    return BLOCK_BYTES if end is None else min(BLOCK_BYTES, max(end - place, 0))
