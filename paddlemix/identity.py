"""The content of a file as a digest: every byte is hashed once, and again only if the file may have changed.

    file_digest("model.safetensors")      "5f0c..."; from the cache if path, size, times and inode are unchanged

A digest is blake2b, which needs no special instructions, over pieces of 8 MiB that threads hash side by side.  Knows
no file's meaning.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from paddlemix.cached_table import CachedTable, TableLayout
from paddlemix.errors import MissingFileError
from paddlemix.progress_bar import ProgressBar

DIGEST_BYTES = 16  # 32 hexadecimal digits: two are never equal by chance
_PIECE = 8 * 1024**2  # changing it changes every digest
_BUFFER = 1024**2  # read at once: it stays in the processor's cache until it is hashed
_GROUP = 64  # small files that one thread takes at once
_BLOCK = 4096  # files between two commits
_STATE_GROUP = 256
_STATE_THREADS = 16  # they wait for the network, where the files are there
_SHOWN_AFTER = 3  # seconds before a progress bar appears
# On a file system that counts in seconds (FAT: two) a second change may get the time of the first; until that time has
# passed, the time does not show whether a file is still as it was when it was read.
_GRANULARITY_NS = 2_000_000_000
_WORTH_WAITING = 256 * 1024**2  # bytes; hashing these again takes longer than waiting

_LAYOUT = TableLayout(
    kind="digests",
    file="digests-1.sqlite3",
    what="digests of files",
    columns="bytes INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL, inode INTEGER NOT NULL, "
    "digest BLOB NOT NULL, checksum INTEGER NOT NULL",
)
_table = CachedTable(_LAYOUT)


class FileState(NamedTuple):
    """What shows, without reading it, that a file is unchanged.

    Args:
        size: bytes.
        mtime_ns: time of its last change; copying may keep it, `touch` sets it.
        ctime_ns: time when the system last noted any change; no program can set it back.
        inode: its number on its file system.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


def file_state(path: str | Path) -> FileState | None:
    """The state of a regular file, links followed; None where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a zero character in the path
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return FileState(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino & (2**63 - 1))


def file_states(paths: Sequence[str | Path]) -> list[FileState | None]:
    """`file_state` of many files, in threads if they are many."""
    if len(paths) <= _STATE_GROUP:
        return list(map(file_state, paths))
    groups = [paths[start : start + _STATE_GROUP] for start in range(0, len(paths), _STATE_GROUP)]
    with ThreadPoolExecutor(_STATE_THREADS) as pool:
        return [state for found in pool.map(lambda group: list(map(file_state, group)), groups) for state in found]


def is_settled(state: FileState, now_ns: int) -> bool:
    """Whether a change from `now_ns` (`time.time_ns`) on would change the state of a file."""
    # Git has the same problem ("racy git") and solves it the same way: a file as new as its record is not trusted.
    return state.ctime_ns + _GRANULARITY_NS < now_ns


def wait_until_settled(states: Iterable[FileState], worth: int = _WORTH_WAITING) -> None:
    """Waits, for about two seconds at most, until large files that were just written are settled.

    Args:
        worth: total bytes from which waiting is worth it.
    """
    states = list(states)
    if sum(state.size for state in states) < worth:
        return
    newest = max(state.ctime_ns for state in states)
    wait = newest + _GRANULARITY_NS - time.time_ns()
    if 0 <= wait <= _GRANULARITY_NS:  # more: the clock of another machine is ahead
        time.sleep(wait / 1e9 + 0.001)


def file_digest(path: str | Path) -> str:
    """The digest of a file's content, 32 hexadecimal digits.

    Raises:
        MissingFileError: it is not a file that can be read.
    """
    (found,) = file_digests([path])
    if found is None:
        raise MissingFileError(f"'{path}' does not exist or cannot be read")
    return found


def fresh_digest(path: str | Path) -> str:
    """The digest of a file's bytes as they are now, whatever the cache says: for files that may decay on the disk.

    Raises:
        MissingFileError: it does not exist or cannot be read.
    """
    state = file_state(path)
    if state is None:
        raise MissingFileError(f"'{path}' does not exist")
    with ThreadPoolExecutor(num_threads()) as pool:
        found = _hash_file(path, state, pool if state.size > _PIECE else None)
    if found is None:
        raise MissingFileError(f"'{path}' cannot be read")
    return found


def file_digests(paths: Sequence[str | Path], what: str = "files", threads: int | None = None) -> list[str | None]:
    """`file_digest` of many, in their order; None for one that cannot be read.

    Args:
        what: what they are, for the progress bar.
        threads: that hash in parallel; None for one per processor.
    """
    found: list[str | None] = []
    with ProgressBar(f"hash {what}", len(paths), delay=_SHOWN_AFTER) as bar:
        for start in range(0, len(paths), _BLOCK):
            found += _digests_of_block(paths[start : start + _BLOCK], bar, threads or num_threads())
    return found


def known_digests(paths: Sequence[str | Path], states: Sequence[FileState | None]) -> list[str | None]:
    """The digests that the cache has for files in these states; None for the others.  Reads no file."""
    found: list[str | None] = []
    for start in range(0, len(paths), _BLOCK):
        keys = _keys(paths[start : start + _BLOCK])
        rows = _table.read(list(dict.fromkeys(keys)))
        for key, state in zip(keys, states[start : start + _BLOCK], strict=True):
            # The checksum protects against a damaged database, which would otherwise vouch for weights that have
            # changed.
            row = rows.get(key)
            good = row is not None and state == row[:4] and row[5] == _checksum(key, row[:5])
            found.append(row[4].hex() if good and row is not None else None)
    return found


def _digests_of_block(paths: Sequence[str | Path], bar: ProgressBar, threads: int) -> list[str | None]:
    states = file_states(paths)
    found = known_digests(paths, states)
    new = [place for place, state in enumerate(states) if state is not None and found[place] is None]
    bar.update(len(paths) - len(new))
    chosen = [(paths[place], state) for place in new if (state := states[place]) is not None]
    wait_until_settled(state for _, state in chosen)
    started = time.time_ns()
    digests = _hash_files(chosen, bar, threads)
    keys, rows = _keys([path for path, _ in chosen]), {}
    for key, (path, state), digest in zip(keys, chosen, digests, strict=True):
        # Kept only if the file cannot have changed while it was hashed: it was settled before, and has the same state
        # after.
        if digest is not None and is_settled(state, started) and file_state(path) == state:
            row = (*state, bytes.fromhex(digest))
            rows[key] = (*row, _checksum(key, row))
    _table.write(rows)
    for place, digest in zip(new, digests, strict=True):
        found[place] = digest
    return found


def _keys(paths: Sequence[str | Path]) -> list[bytes]:
    """Files by folder, with its links resolved, and name."""
    folders: dict[str, str] = {}
    keys = []
    for path in paths:
        folder, name = os.path.split(os.fspath(path))
        if folder not in folders:
            try:
                folders[folder] = os.path.realpath(folder)
            except (OSError, ValueError):
                folders[folder] = os.path.abspath(folder)
        keys.append(os.fsencode(os.path.join(folders[folder], name)))
    return keys


def _checksum(key: bytes, row: Sequence[object]) -> int:
    return zlib.crc32(repr((key, *row)).encode())


def _hash_files(files: Sequence[tuple[str | Path, FileState]], bar: ProgressBar, threads: int) -> list[str | None]:
    """The digests of files, small ones in groups and large ones in pieces side by side."""
    found: list[str | None] = [None] * len(files)
    # Small files: a task for each would cost more than hashing it, so one thread takes a group.  Large files: one at a
    # time, its pieces side by side, so that the disk reads in order and a single 10 GB file still uses all cores.
    small = [place for place, (_, state) in enumerate(files) if state.size <= _PIECE]
    groups = [small[start : start + _GROUP] for start in range(0, len(small), _GROUP)]

    def hash_group(group: list[int]) -> list[str | None]:
        return [_hash_file(*files[place], None) for place in group]

    with ThreadPoolExecutor(threads) as pool:
        for group, digests in zip(groups, pool.map(hash_group, groups), strict=True):
            for place, digest in zip(group, digests, strict=True):
                found[place] = digest
            bar.update(len(group))
        for place, (path, state) in enumerate(files):
            if state.size > _PIECE:
                found[place] = _hash_file(path, state, pool)
                bar.update()
    return found


def num_threads() -> int:
    """Threads that hash in parallel: one per processor that this process may use."""
    return max(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 1)


def _hash_file(path: str | Path, state: FileState, pool: ThreadPoolExecutor | None) -> str | None:
    """The digest of one file; None where it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except (OSError, ValueError):
        return None
    try:
        # An empty file has one empty piece, so that its digest is a digest too.
        starts = range(0, max(state.size, 1), _PIECE)
        run: Callable[..., Iterable[bytes]] = map if pool is None else pool.map
        return combined(run(lambda start: _hash_piece(descriptor, start), starts))
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _hash_piece(descriptor: int, start: int) -> bytes:
    hashed = hashlib.blake2b(digest_size=DIGEST_BYTES)
    offset, end = start, start + _PIECE
    # `pread` takes the offset with it, so that threads share the descriptor; hashing releases the interpreter lock.
    while offset < end and (data := os.pread(descriptor, min(_BUFFER, end - offset), offset)):
        hashed.update(data)
        offset += len(data)  # a network may return less than requested
    return hashed.digest()


def combined(pieces: Iterable[bytes]) -> str:
    """One digest of the digests of a content's pieces, in order."""
    whole = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for piece in pieces:
        whole.update(piece)
    return whole.hexdigest()


def text_digest(*parts: object) -> str:
    """The digest of some texts; differs if any of them differs."""
    # The separator keeps ("ab", "c") and ("a", "bc") apart.
    encoded = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(encoded, digest_size=DIGEST_BYTES).hexdigest()


def differences(then: Mapping[str, str], now: Mapping[str, str], shown: int = 5) -> list[str]:
    """What differs between two sets of named digests, in words.

    Args:
        then, now: name -> digest.
        shown: most names that are listed of a kind.

    Returns:
        At most three texts such as "changed: a.png, b.png and 7 more"; [] if nothing differs.

    Example:
        >>> differences({"a": "1", "b": "2"}, {"b": "3", "c": "4"})
        ['changed: b', 'missing: a', 'new: c']
    """
    kinds = {
        "changed": [name for name in then if name in now and then[name] != now[name]],
        "missing": [name for name in then if name not in now],
        "new": [name for name in now if name not in then],
    }
    return [f"{kind}: {listed(names, shown)}" for kind, names in kinds.items() if names]


def listed(names: Sequence[str], shown: int = 5) -> str:
    """Names in one text, the first ones where they are many: "a, b and 7 more"."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
