"""One table of the cache in an SQLite file: facts about files by their paths, shared by all processes and runs.

A damaged database is rebuilt, one that cannot be written is replaced by memory; both cause a warning.  Knows no fact's
meaning.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from paddlemix.cache import cache_directory
from paddlemix.errors import UserError
from paddlemix.log import logger

_BUSY_SECONDS = 30.0
_VARIABLES = 512  # of one SELECT; SQLite's own limit was 999


@dataclass(frozen=True)
class TableLayout:
    """What a table holds and where.

    Args:
        kind: folder of the cache, see `cache.cache_directory`.
        file: name of the database; a number in it counts changes of the table.
        what: its content in messages, "sizes of images".
        columns: their declarations in SQL, after the key `path`.
        on_conflict: SQL that merges a new row with the existing one; "" replaces it.
    """

    kind: str
    file: str
    what: str
    columns: str
    on_conflict: str = ""

    @property
    def create(self) -> str:
        return f"CREATE TABLE IF NOT EXISTS facts (path BLOB PRIMARY KEY, {self.columns}) WITHOUT ROWID"

    @property
    def store(self) -> str:
        marks = ", ".join("?" * (2 + self.columns.count(",")))
        verb = "INSERT" if self.on_conflict else "INSERT OR REPLACE"
        return f"{verb} INTO facts VALUES ({marks}) {self.on_conflict}"


class CachedTable:
    """The table, or memory in place of it; may be pickled.  Each thread of each process has its own connection."""

    def __init__(self, layout: TableLayout) -> None:
        self._layout = layout
        self._local = threading.local()
        self._memory: dict[bytes, tuple[Any, ...]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_layout": self._layout, "_memory": self._memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _local=threading.local())

    def read(self, keys: Sequence[bytes]) -> dict[bytes, tuple[Any, ...]]:
        """The rows of some paths, without the path; missing ones are omitted."""
        if not keys:
            return {}
        # The database may have given way to memory at any earlier call, of this table in this process.
        rows: list[tuple[Any, ...]] | None = self._run(lambda database: select_rows(database, keys))
        if rows is None:
            memory = self._memory or {}
            return {key: memory[key] for key in keys if key in memory}
        return {row[0]: tuple(row[1:]) for row in rows}

    def write(self, rows: Mapping[bytes, tuple[Any, ...]]) -> None:
        """Stores rows, replacing earlier ones."""
        statement = self._layout.store
        stored = not rows or self._run(lambda database: store_rows(database, statement, rows))
        if not stored and self._memory is not None:
            self._memory.update(rows)

    def _run(self, action: Any) -> Any:
        """The result of the action, or None once memory has replaced the database."""
        for last in (False, True):
            if self._memory is not None:
                return None
            try:
                return action(self._database())
            # error                      -> what happens
            # busy, read-only, full      -> memory takes over for this process
            # not a database, malformed  -> rebuilt once, then memory
            # no cache folder            -> memory
            except sqlite3.OperationalError as error:  # locked for too long, read-only, full, no such folder
                self._forsake(error)
            except sqlite3.DatabaseError as error:
                if last:
                    self._forsake(error)
                else:
                    self._rebuild(error)
            except (UserError, OSError) as error:  # no folder for the cache
                self._forsake(error)
        return None

    def _path(self) -> Path:
        return cache_directory(self._layout.kind) / self._layout.file

    def _database(self) -> sqlite3.Connection:
        """This thread's connection; one that came through a fork is left alone."""
        place = (os.getpid(), self._path())  # the cache may be another folder by now
        if getattr(self._local, "place", None) != place:
            self._local.inherited = getattr(self._local, "database", None)  # closing it would disturb the parent
            self._local.database = self._connect(place[1])
            self._local.place = place
        return self._local.database

    def _forsake(self, error: Exception) -> None:
        logger.warning(
            "the %s are kept in memory only, the index in the cache cannot be used: %s", self._layout.what, error
        )
        self._memory = {}

    def _rebuild(self, error: Exception) -> None:
        path = self._path()
        self._local = threading.local()
        try:
            with FileLock(path.with_suffix(".rebuild.lock")):
                if self._is_whole(path):  # another process was first
                    return
                logger.warning("the index of %s, %s, is damaged (%s) and is rebuilt", self._layout.what, path, error)
                for suffix in ("", "-wal", "-shm"):
                    Path(f"{path}{suffix}").unlink(missing_ok=True)
        except OSError as problem:
            self._forsake(problem)

    def _connect(self, path: Path) -> sqlite3.Connection:
        database = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
        try:
            database.execute("PRAGMA synchronous=NORMAL")
            if database.execute("PRAGMA journal_mode").fetchone() != ("wal",):
                with FileLock(path.with_suffix(".lock"), timeout=_BUSY_SECONDS):  # SQLite does not wait here by itself
                    database.execute("PRAGMA journal_mode=WAL")  # then readers and a writer do not wait for each other
            database.execute(self._layout.create)
        except sqlite3.Error:
            database.close()
            raise
        return database

    def _is_whole(self, path: Path) -> bool:
        try:
            database = self._connect(path)
        except sqlite3.DatabaseError:
            return False
        try:
            return database.execute("PRAGMA quick_check").fetchone() == ("ok",)
        except sqlite3.DatabaseError:
            return False
        finally:
            database.close()


def select_rows(database: sqlite3.Connection, keys: Sequence[bytes]) -> list[tuple[Any, ...]]:
    """The rows of some paths, the path first."""
    rows: list[tuple[Any, ...]] = []
    # One statement for many paths: a query for each of 600,000 pictures would take longer than hashing small ones.
    for start in range(0, len(keys), _VARIABLES):
        some = keys[start : start + _VARIABLES]
        marks = ",".join("?" * len(some))
        rows += database.execute(f"SELECT * FROM facts WHERE path IN ({marks})", some).fetchall()
    return rows


def store_rows(database: sqlite3.Connection, statement: str, rows: Mapping[bytes, tuple[Any, ...]]) -> bool:
    """Writes rows in one transaction.

    Returns:
        True.
    """
    # IMMEDIATE takes the write lock now and waits for it; a transaction that begins as a reader would fail instead.
    database.execute("BEGIN IMMEDIATE")
    try:
        database.executemany(statement, [(key, *row) for key, row in rows.items()])
    except sqlite3.Error:
        database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")
    return True
