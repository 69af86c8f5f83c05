"""What the records of a data file and the pictures of a data set hold, and what differs in words.

A picture's entry is its digest and the state of its file, both 64 bits: a file whose state is as it was is not read
again.  Knows no run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paddlemix.cache import cache_directory, replacing
from paddlemix.datasets.mixture import SampleDataset
from paddlemix.datasets.records.record_file import RecordFile
from paddlemix.errors import UserError
from paddlemix.identity import FileState, file_digests, file_states, listed

# 64 bits: among a million pictures two digests are equal by chance once in 40 million data sets
_DIGEST = 8  # bytes of one record's or picture's digest
_BLOCK = 512  # pictures between two checks whether to stop
UNKNOWN = np.uint64(0)


@dataclass
class Pictures:
    """The pictures of some samples in their order, each as often as it is used.

    Args:
        digests, states: uint64 [n]; UNKNOWN where a file is missing, was not hashed yet, or the picture is not a file.
    """

    digests: np.ndarray
    states: np.ndarray

    @classmethod
    def unknown(cls, count: int) -> Pictures:
        """Entries that say nothing."""
        return cls(np.zeros(count, np.uint64), np.zeros(count, np.uint64))

    @classmethod
    def joined(cls, blocks: Sequence[Pictures]) -> Pictures:
        """One block after the other."""
        blocks = [cls.unknown(0), *blocks]
        return cls(np.concatenate([b.digests for b in blocks]), np.concatenate([b.states for b in blocks]))

    def part(self, start: int, count: int) -> Pictures:
        """Some entries; unknown ones after the last."""
        more = self.unknown(max(start + count - len(self.digests), 0))
        found = Pictures(self.digests[start : start + count], self.states[start : start + count])
        return (
            Pictures.joined([found, more.part(0, count - len(found.digests))]) if len(found.digests) < count else found
        )


def picture_blocks(data: SampleDataset) -> Iterator[list[str]]:
    """The files of a data set's pictures, some at a time; "" for one that is not a file (yet)."""
    block: list[str] = []
    for index in range(len(data)):
        block += data.image_files(index)
        if len(block) >= _BLOCK:
            yield block
            block = []
    if block:
        yield block


def states_of(paths: Sequence[str], known: Pictures) -> Pictures:
    """The entries of some pictures without reading any.

    Args:
        paths: their files.
        known: entries of the same pictures from before: where a file's state is unchanged, its digest is kept.
    """
    # size, times and inode: cheap for a million files, and they change with every ordinary way to write one
    states = np.array([_state_entry(state) for state in file_states(paths)], np.uint64)
    return Pictures(np.where(known.states == states, known.digests, UNKNOWN), states)


def hashed(paths: Sequence[str], pictures: Pictures, threads: int | None = None) -> Pictures:
    """The entries of some pictures with the digests that were unknown.

    Args:
        threads: that hash side by side; None for as many as processors.
    """
    # A file that is used many times is read once.
    digests = pictures.digests.copy()
    new = np.flatnonzero((digests == UNKNOWN) & (pictures.states != UNKNOWN)).tolist()
    unique = list(dict.fromkeys(paths[place] for place in new))
    found = dict(zip(unique, file_digests(unique, "pictures", threads), strict=True))
    for place in new:
        digest = found[paths[place]]
        digests[place] = UNKNOWN if digest is None else np.uint64(int(digest[: 2 * _DIGEST], 16))
    return Pictures(digests, pictures.states)


def _state_entry(state: FileState | None) -> int:
    if state is None:
        return int(UNKNOWN)
    hashed = hashlib.blake2b(repr(tuple(state)).encode(), digest_size=_DIGEST)
    return int.from_bytes(hashed.digest(), "big") or 1


def record_digests(records: RecordFile, content: str) -> np.ndarray:
    """A digest of each record, uint64 [n], whatever its spaces and the order of its keys; kept in the cache by what the
    file holds.

    Args:
        content: the file's digest.

    Raises:
        UserError: the file has changed since it was opened, or the cache cannot be written.
    """
    # by the file's content: a copy, or a file that was moved, is not read again
    kept = cached_record_digests(content)
    if kept is not None and len(kept) == len(records):
        return kept
    found = np.fromiter(map(_record_entry, records.raw()), np.uint64, len(records))
    with replacing(_place(content)) as temporary, temporary.open("wb") as file:
        np.save(file, found)
    return found


def _record_entry(data: bytes) -> int:
    with contextlib.suppress(ValueError, RecursionError):  # a record that cannot be used counts as it is written
        # spaces and the order of keys do not change a sample
        data = json.dumps(json.loads(data), sort_keys=True, separators=(",", ":")).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=_DIGEST).digest(), "big")


def cached_record_digests(content: str) -> np.ndarray | None:
    """The digests of the records of a file that held `content`; None where the cache has none."""
    try:
        found = np.load(_place(content))
    except (OSError, ValueError, EOFError, UserError):
        return None
    return found if found.dtype == np.uint64 and found.ndim == 1 else None


def _place(content: str) -> Path:
    return cache_directory("digests") / f"records-{content}.npy"


def describe_records(name: str, then: np.ndarray | None, now: np.ndarray) -> str:
    """What differs between the records that a file held and those that it holds, in words; "" where nothing does.

    Args:
        name: of the file.
        then, now: see `record_digests`; None where it is not known what it held.

    Example:
        >>> describe_records("train.json", np.uint64([1, 2, 3]), np.uint64([1, 9, 3]))
        'record 1 of train.json'
    """
    if then is None:
        return name
    shared = min(len(then), len(now))
    differing = np.flatnonzero(then[:shared] != now[:shared])
    first = int(differing[0]) if len(differing) else shared
    if len(then) != len(now):
        return f"{name} (it has {len(now)} records instead of {len(then)} and differs from record {first} on)"
    if not len(differing):
        return ""
    # told apart from a changed record: an order alone changes which samples meet in a batch
    if np.array_equal(np.sort(then), np.sort(now)):
        return f"{name} (the same records in another order from record {first} on)"
    numbers = [str(number) for number in differing.tolist()]
    return f"{'record' if len(numbers) == 1 else 'records'} {listed(numbers)} of {name}"
