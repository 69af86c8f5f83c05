"""The index of a data file: place and words of each record, and what is wrong with the bad ones.

Made in one pass over the file, kept in one file of the cache, mapped from there ever after.  Holds no record.

The kept file: a header (`_HEADER_BYTES` of JSON, padded), the rows as they are, then each message as a line of JSON.
"""

from __future__ import annotations

import json
import mmap
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paddlemix import __version__
from paddlemix.cache import replacing
from paddlemix.datasets.records.file_kind import Layout, check_lines, recognise
from paddlemix.datasets.records.scan import first_solid, scan_array, scan_lines
from paddlemix.datasets.records.syntax_errors import ArrayReader
from paddlemix.datasets.records.validation import Task, check_all
from paddlemix.errors import UserError
from paddlemix.progress_bar import ProgressBar

INDEX_VERSION = f"4 {__version__}"  # what a record may be changes with the package

_HEADER_BYTES = 256
_PARALLEL_BYTES = 20 * 1024**2  # below, starting processes costs more than the work
_SHOWN_BYTES = 100 * 1024**2  # from here on there is a progress bar


@dataclass(frozen=True)
class Index:
    """What is known of each record.

    Args:
        rows: int64 [n, 3]: first byte, byte after the last one, words (see `order.count_words`; 0: cannot be used).
        lines: one JSON array [kind, number, message] per record that cannot be used ("problem") or may not mean what it
            is taken for ("doubt"), and one ["folder", 0, name] per folder that images are in, each on a line; UTF-8.
    """

    rows: np.ndarray
    lines: bytes | memoryview

    def problems(self) -> list[tuple[int, str]]:
        """Number and what is wrong, beginning with "record N"; ascending."""
        return self._messages("problem")

    def doubts(self) -> list[tuple[int, str]]:
        """Number and what may be wrong, beginning with "record N", of records that are used; ascending."""
        return self._messages("doubt")

    def image_folders(self) -> list[str]:
        """Folders that local images of the records are in, as the records spell them; "" for a name alone."""
        return [folder for _, folder in self._messages("folder")]

    def _messages(self, wanted: str) -> list[tuple[int, str]]:
        start = f'["{wanted}"'.encode()
        lines = (json.loads(line) for line in bytes(self.lines).splitlines() if line.startswith(start))
        return [(number, message) for _, number, message in lines]


def build_index(path: str, name: str, form: str | None) -> Index:
    """Finds and checks all records of a file.

    Args:
        path: the file.
        name: of the file in messages.
        form: see `parse.parse_record`.

    Raises:
        UserError: it is neither a JSON array of objects nor JSON Lines, or holds no record.
        OSError: it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        layout = recognise(descriptor, name)
        return _Builder(descriptor, path, name, layout).build(form)
    finally:
        os.close(descriptor)


class _Builder:
    """One pass over an open file."""

    def __init__(self, descriptor: int, path: str, name: str, layout: Layout) -> None:
        self._descriptor = descriptor
        self._path = path
        self._name = name
        self._layout = layout
        self._size = os.fstat(descriptor).st_size
        self._closed: int | None = None  # the byte after the array

    def build(self, form: str | None) -> Index:
        rows: list[np.ndarray] = []
        messages: list[bytes] = []
        folders: set[str] = set()
        count, end = 0, self._layout.inside
        for spans, checked in check_all(self._tasks(form), self._size >= _PARALLEL_BYTES):
            # The array itself is broken: where is found by reading it again, slowly, from the last good record.
            if checked.broken is not None:
                valid = checked.broken - count
                raise self._explain(int(spans.ends[valid - 1]) if valid else spans.previous, checked.broken)
            # 24 bytes a record: a million of them stay below the size of a few pictures
            rows.append(np.stack([spans.starts, spans.ends, checked.words], axis=1))
            for kind, found in (("problem", checked.problems), ("doubt", checked.doubts)):
                messages += [json.dumps([kind, *item]).encode() + b"\n" for item in found]
            folders |= checked.folders
            count, end = count + len(spans.starts), int(spans.ends[-1])
        self._check_end(end, count)
        messages += [json.dumps(["folder", 0, folder]).encode() + b"\n" for folder in sorted(folders)]
        return Index(np.concatenate(rows), b"".join(messages))

    def _tasks(self, form: str | None) -> Iterator[Task]:
        scan = scan_array if self._layout.is_array else scan_lines
        title = f"index {os.path.basename(self._name)}"
        bar = ProgressBar(title, self._size, unit="B", silent=self._size < _SHOWN_BYTES)
        count = 0
        with bar:
            for spans in scan(self._descriptor, self._layout.inside):
                bar.update(spans.scanned - bar.done)
                # known only with the last block, and needed when all records are checked
                self._closed = spans.closed
                if len(spans.starts):
                    if not count and not self._layout.is_array:
                        check_lines(self._descriptor, self._name, spans)
                    yield Task(self._path, spans, count, form)
                    count += len(spans.starts)

    def _check_end(self, end: int, count: int) -> None:
        """Raises an error about what follows the last record, if it is wrong."""
        if self._layout.is_array:
            if self._closed is None or os.pread(self._descriptor, 1, self._closed - 1) != b"]":
                raise self._explain(end, count)
            # a comma before the closing bracket, or anything after it
            gap = first_solid(self._descriptor, end, self._closed - 1)
            if gap is not None or first_solid(self._descriptor, self._closed) is not None:
                raise self._explain(end, count)
        if not count:
            raise UserError(f"data file '{self._name}' holds no record")

    def _explain(self, end: int, number: int) -> UserError:
        return ArrayReader(self._descriptor, self._name, self._layout.begin).explain(end, number)


def write_index(store: Path, index: Index, identity: tuple[int, int]) -> None:
    """Keeps an index.

    Args:
        store: its place.
        identity: size in bytes and time of change in ns of the file that it is of.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    rows = np.ascontiguousarray(index.rows, np.int64)
    checksum = zlib.crc32(index.lines, zlib.crc32(rows.data))
    # the header comes first and has a fixed size, so the rows can be mapped where they are
    header = json.dumps(_header(identity) | {"records": len(rows), "checksum": checksum}).encode()
    with replacing(store) as temporary, open(temporary, "wb") as file:
        file.write(header.ljust(_HEADER_BYTES - 1) + b"\n")
        file.write(rows.data)
        file.write(index.lines)


def read_index(store: Path, identity: tuple[int, int]) -> Index | None:
    """Maps a kept index.

    Returns:
        None where there is none, where it is of another state of the file or of another version, or damaged.
    """
    try:
        with open(store, "rb") as file:
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        header = json.loads(bytes(mapped[:_HEADER_BYTES]))
    except (OSError, ValueError):
        return None
    if not isinstance(header, dict) or not header.items() >= _header(identity).items():
        return None
    # a disk that filled up, or a crash before the file was flushed
    if zlib.crc32(mapped[_HEADER_BYTES:]) != header.get("checksum"):
        return None
    count = header["records"]
    rows = np.frombuffer(mapped, np.int64, 3 * count, _HEADER_BYTES).reshape(count, 3)
    return Index(rows, mapped[_HEADER_BYTES + rows.nbytes :])


def _header(identity: tuple[int, int]) -> dict[str, object]:
    return {"version": INDEX_VERSION, "size": identity[0], "changed": identity[1]}
