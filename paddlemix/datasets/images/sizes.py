"""Sizes of images, kept between runs: a header is read once for each file, and again when the file has changed.

One SQLite file in the cache, shared by all processes and runs.  Knows no record and no model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from paddlemix.cached_table import CachedTable, TableLayout
from paddlemix.datasets.images.decode import check_limits, image_size
from paddlemix.datasets.images.sources import ImageSettings, is_data_uri, is_url, local_path
from paddlemix.errors import UserError
from paddlemix.identity import FileState, file_state
from paddlemix.network.fetch import cached

_SAME = " AND ".join(f"{column} = excluded.{column}" for column in ("bytes", "mtime_ns", "ctime_ns", "inode"))
_LAYOUT = TableLayout(
    kind="images",
    file="sizes-3.sqlite3",
    what="sizes of images",
    columns="bytes INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL, inode INTEGER NOT NULL, "
    "width INTEGER NOT NULL, height INTEGER NOT NULL, decoded INTEGER NOT NULL",
    # Another process may have decoded the same state of the file meanwhile.
    on_conflict="ON CONFLICT (path) DO UPDATE SET bytes = excluded.bytes, mtime_ns = excluded.mtime_ns, "
    "ctime_ns = excluded.ctime_ns, inode = excluded.inode, width = excluded.width, height = excluded.height, "
    f"decoded = excluded.decoded OR (decoded AND {_SAME})",
)
_BLOCK = 2048  # files between two commits
_THREADS = 8  # they wait for the disk or for servers
_READ_FROM = 4  # new files; fewer are read without threads


class _Entry(NamedTuple):
    """What is known of a file: its state when it was read, the image's sides, and whether all of it decoded well."""

    bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    width: int
    height: int
    decoded: int


_Header = tuple[tuple[int, int] | UserError, tuple[bytes, _Entry] | None]  # the size, and what to store of it


class ImageSizes:
    """Sizes of images by path, http(s) address or `data:` URI; may be pickled and carried into other processes.

    Args:
        settings: limits on images; they hold for images that are known, too.
    """

    def __init__(self, settings: ImageSettings | None = None) -> None:
        self._settings = settings or ImageSettings()
        self._index = CachedTable(_LAYOUT)

    def get(self, path: str) -> tuple[int, int]:
        """Width and height in pixels of what `load_image` returns.

        Raises:
            MissingFileError, UserError: as `image_size`.
        """
        size = self.get_many([path])[0]
        if isinstance(size, UserError):
            raise size
        return size

    def get_many(self, paths: Sequence[str]) -> list[tuple[int, int] | UserError]:
        """The same for many, in their order; for an image that cannot be used, its error."""
        found: dict[str, tuple[int, int] | UserError] = {}
        for block in _blocks(list(dict.fromkeys(paths)), _BLOCK):
            found.update(zip(block, self._look_up(block), strict=True))
        return [found[path] for path in paths]

    def mark_decoded(self, paths: Iterable[str]) -> None:
        """Notes that images were decoded without an error.  `data:` URIs and images with an error are passed over."""
        for block in _blocks([path for path in dict.fromkeys(paths) if not is_data_uri(path)], _BLOCK):
            self.get_many(block)
            states = filter(None, map(_state, block))
            known = self._read([key for key, _ in states])
            self._index.write({key: entry._replace(decoded=1) for key, entry in known.items() if not entry.decoded})

    def is_decoded(self, path: str) -> bool:
        """Whether the image was decoded without an error and has not changed since."""
        state = _state(path)
        entry = None if state is None else self._read([state[0]]).get(state[0])
        return entry is not None and _is_of(entry, state) and bool(entry.decoded)

    def _look_up(self, paths: list[str]) -> list[tuple[int, int] | UserError]:
        """`get_many` for a block of different paths."""
        states = [_state(path) for path in paths]
        known = self._read([state[0] for state in states if state is not None])
        entries = [known.get(state[0]) if state is not None else None for state in states]
        new = [
            number
            for number, (entry, state) in enumerate(zip(entries, states, strict=True))
            if entry is None or not _is_of(entry, state)
        ]
        read = dict(zip(new, self._read_headers([paths[number] for number in new]), strict=True))
        self._index.write(dict(stored for _, stored in read.values() if stored is not None))
        return [
            read[number][0] if number in read else self._within_limits(path, entry)
            for number, (path, entry) in enumerate(zip(paths, entries, strict=True))
        ]

    def _read(self, keys: Sequence[bytes]) -> dict[bytes, _Entry]:
        return {key: _Entry(*row) for key, row in self._index.read(keys).items()}

    def _within_limits(self, path: str, entry: _Entry | None) -> tuple[int, int] | UserError:
        size = (entry.width, entry.height) if entry is not None else (0, 0)
        try:
            check_limits(path, entry.bytes if entry is not None else 0, size, self._settings)
        except UserError as error:
            return error
        return size

    def _read_headers(self, paths: list[str]) -> list[_Header]:
        if len(paths) < _READ_FROM:
            return list(map(self._read_header, paths))
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(self._read_header, paths))

    def _read_header(self, path: str) -> _Header:
        try:
            if not is_data_uri(path):
                local_path(path, self._settings)  # now a URL has a file
            state = _state(path)  # before the header: a change in between is seen the next time
            size = image_size(path, self._settings)
        except UserError as error:
            return error, None
        return size, None if state is None else (state[0], _Entry(*state[1], *size, 0))


def _state(path: str) -> tuple[bytes, FileState] | None:
    """The key of an image's file, with the file's state; None where there is no file (yet)."""
    file = cached(path) if is_url(path) else None if is_data_uri(path) else path
    state = None if file is None else file_state(file)
    return None if file is None or state is None else (os.fsencode(os.path.abspath(file)), state)


def _is_of(entry: _Entry, state: tuple[bytes, FileState] | None) -> bool:
    return state is not None and entry[: len(state[1])] == state[1]


def _blocks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
