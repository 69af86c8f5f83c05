"""Data files as sequences of records that are read one at a time: JSON arrays and JSON Lines, local or by URL.

    records = open_records("train.json"); len(records); records[17]

The first opening makes an index, which the cache keeps: a million records are open at once, and none is in memory.
Knows no images and no templates.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from paddlemix.cache import cache_directory, cache_key
from paddlemix.datasets.forms.image_keys import locate
from paddlemix.datasets.forms.parse import parse_record
from paddlemix.datasets.records.index import INDEX_VERSION, Index, build_index, read_index, write_index
from paddlemix.datasets.records.json_values import DECODER
from paddlemix.errors import MissingFileError, UserError, without_secrets
from paddlemix.file_locks import one_at_a_time
from paddlemix.identity import file_digest
from paddlemix.lfs import refuse_pointer
from paddlemix.log import logger
from paddlemix.network.client import RemoteSettings
from paddlemix.network.fetch import fetch
from paddlemix.outputs import Pictures

# Files of millions of records; a slow connection may need hours.
DOWNLOADS = RemoteSettings(max_bytes=64 * 1024**3, timeout=60.0, deadline=24 * 3600.0)


def open_records(path: str | Path, form: str | None = None, remote: RemoteSettings | None = None) -> RecordFile:
    """Opens a data file.

    Args:
        path: a JSON array of objects or JSON Lines, UTF-8; or its http(s) URL.
        form: what the records are, see `parse.parse_record`; None recognises it.
        remote: how a URL is fetched; None allows 64 GiB.

    Raises:
        MissingFileError: the file does not exist or cannot be read.
        UserError: it is neither kind of file, is broken or holds no record; or a URL cannot be fetched.  A record that
            cannot be used raises nothing here: see `RecordFile.problems`.
    """
    name = str(path)
    local = str(fetch(name, remote or DOWNLOADS)) if name.startswith(("http://", "https://")) else os.path.abspath(name)
    return RecordFile(without_secrets(name), form, local)


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """All records of a data file, in memory; whether they are conversations is not asked.

    Raises:
        MissingFileError, UserError: as `open_records`, and where a line is not a record.
    """
    records = open_records(path)
    return [records[number] for number in range(len(records))]


class RecordFile:
    """The records of one file; made by `open_records`.

    Threads may share it.  A copy that is sent to another process opens the same file there.

    Args:
        path: as the user gave it, for messages.
        form: see `open_records`.
        local: the file itself.
        expected: size and time of change that it must have; None for those of now.
        index: used instead of the cache's.

    Attributes:
        words: int32 [n], see `order.count_words`: words of each record, negative where it has no image, 0 where it
            cannot be used.
        fingerprint: differs where the file, the form or this package's reading of it differs.
    """

    def __init__(
        self,
        path: str,
        form: str | None,
        local: str,
        expected: tuple[int, int] | None = None,
        index: Index | None = None,
    ) -> None:
        self.path = path
        self._form = form
        self._local = local
        self._identity = expected or _identity(path, local)
        self._check_unchanged()
        self._kept = index is None
        self._index = index or self._find_index()
        self.words = self._index.rows[:, 2].astype(np.int32)
        self.fingerprint = cache_key(local, form, INDEX_VERSION, *self._identity)
        with _read_errors(path):
            self._descriptor = os.open(local, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One record, decoded anew.

        Raises:
            IndexError: `number` is not in 0 .. len - 1.
            UserError: it is not a JSON object, or the file has changed since it was opened.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        self._check_unchanged()
        start, end, _ = self._index.rows[number].tolist()
        with _read_errors(self.path):
            # Not mapped: a file cut short meanwhile, or a network that fails, is an error and not a dead process.
            data = os.pread(self._descriptor, end - start, start)
        try:
            record = DECODER.decode(data.decode("utf-8"))
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise UserError(dict(self.problems()).get(number, f"{self.path} record {number} changed during the run"))
        return record

    @property
    def content_digest(self) -> str:
        """What the file holds, wherever it is and whenever it was written; see `identity.file_digest`."""
        return file_digest(self._local)

    def raw(self) -> Iterator[bytes]:
        """The bytes of each record, as the file has them.

        Raises:
            UserError: the file has changed since it was opened.
        """
        self._check_unchanged()
        for start, end, _ in self._index.rows.tolist():
            with _read_errors(self.path):
                yield os.pread(self._descriptor, end - start, start)
        self._check_unchanged()

    def problems(self) -> list[tuple[int, str]]:
        """Number of each record that cannot be used, and what is wrong, beginning with path and record; ascending."""
        return [(number, f"{self.path} {problem}") for number, problem in self._index.problems()]

    def doubts(self) -> list[tuple[int, str]]:
        """The same of each record that is used and may not mean what it is taken for."""
        return [(number, f"{self.path} {doubt}") for number, doubt in self._index.doubts()]

    def pictures(self, image_root: str | None) -> Pictures:
        """The pictures that usable records name, for the guard of what is written.

        Args:
            image_root: folder that relative paths start from.
        """
        folders = [locate(folder, image_root) or os.curdir for folder in self._index.image_folders()]
        return Pictures(self.path, folders, lambda: self._images(image_root))

    def _images(self, image_root: str | None) -> Iterator[str]:
        for number in np.flatnonzero(self.words).tolist():
            yield from parse_record(self[number], f"{self.path} record {number}", image_root, self._form).images

    def __reduce__(self) -> tuple[Any, ...]:
        # with an index in the cache a worker maps it; without one the index itself has to travel
        carried = None if self._kept else Index(self._index.rows, bytes(self._index.lines))
        return RecordFile, (self.path, self._form, self._local, self._identity, carried)

    def _check_unchanged(self) -> None:
        if _identity(self.path, self._local) != self._identity:
            raise UserError(f"data file '{self.path}' changed during the run; start again")

    def _find_index(self) -> Index:
        try:
            store = cache_directory("records") / f"{cache_key(self._local, self._form)}.index"
        except UserError as error:
            return self._without_cache(self._build(), error)
        found = read_index(store, self._identity)
        if found is not None:
            return found
        with _one_at_a_time(store):
            found = read_index(store, self._identity)  # another process may have made it meanwhile
            if found is not None:
                return found
            built = self._build()
            try:
                write_index(store, built, self._identity)
            except UserError as error:
                return self._without_cache(built, error)
        mapped = read_index(store, self._identity)
        self._kept = mapped is not None
        return mapped or built

    def _without_cache(self, built: Index, error: UserError) -> Index:
        self._kept = False
        logger.warning("the index of %s is not kept, so the next run makes it again: %s", self.path, error)
        return built

    def _build(self) -> Index:
        try:
            with _read_errors(self.path):
                return build_index(self._local, self.path, self._form)
        finally:
            self._check_unchanged()  # first of all: it may be why there was an error


def _identity(path: str, local: str) -> tuple[int, int]:
    """Size and time of change, ns.

    Raises:
        MissingFileError: the file does not exist.
    """
    try:
        status = os.stat(local)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFileError(f"data file '{path}' does not exist (looked in {Path.cwd()}); check its path") from error
    except OSError as error:
        raise MissingFileError(f"data file '{path}' cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise MissingFileError(f"data file '{path}' is {kind}; give a file")
    refuse_pointer(local, f"data file '{path}'")
    return status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def _read_errors(path: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise MissingFileError(f"data file '{path}' cannot be read: {error.strerror}") from error


@contextlib.contextmanager
def _one_at_a_time(store: Path) -> Iterator[None]:
    """Lets the processes of one run wait for the first."""
    # A child does not wait: its parent may hold the lock and wait for it.  While a child still imports the parent's
    # script only its name tells it.
    alone = multiprocessing.current_process().name == "MainProcess"
    with one_at_a_time(store.with_name(f"{store.name}.lock")) if alone else contextlib.nullcontext():
        yield
