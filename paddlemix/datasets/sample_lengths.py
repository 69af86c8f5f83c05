"""How many tokens every sample of a data set has, and how many of them are visual: counted once, then cached.

Knows no text and no image; the data set measures, from image headers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from paddlemix.cache import cache_directory, cache_key, replacing
from paddlemix.datasets.workers import WorkerPool
from paddlemix.file_locks import one_at_a_time
from paddlemix.progress_bar import ProgressBar

_CHUNK = 512  # samples that a process measures at a time
_ALONE = 4096  # so few samples are measured before processes have started
_VERSION = 1  # of what is stored


class MeasuredDataset(Protocol):
    """What can be measured."""

    @property
    def fingerprint(self) -> str:
        """Differs where any length might."""
        ...

    def __len__(self) -> int: ...

    def measure(self, index: int) -> tuple[int, int]:
        """Tokens of a sample and how many of them are visual; (0, 0) where it is left out."""
        ...


def measure_lengths(dataset: MeasuredDataset, workers: int = 0) -> np.ndarray:
    """Lengths of all samples, from the cache where they are known; of several processes one measures.

    Args:
        dataset: has to survive pickling where there are workers.
        workers: processes that measure; 0, or few samples: this one alone.

    Returns:
        int32 [n, 2]: tokens of each sample and how many of them are visual; (0, 0) where it is left out.

    Raises:
        UserError: a sample cannot be used and the data set skips none; or the cache cannot be written.
    """
    path = cache_directory("lengths") / f"{cache_key(_VERSION, dataset.fingerprint)}.npy"
    # Measuring reads the header of every image; of millions of records that is hours, and it never changes.
    known = _read(path, len(dataset))
    if known is not None:
        return known
    with one_at_a_time(path.with_suffix(".lock")):
        known = _read(path, len(dataset))  # another process may have measured them meanwhile
        return _measure_all(dataset, workers, path) if known is None else known


def _measure_all(dataset: MeasuredDataset, workers: int, path: Path) -> np.ndarray:
    """Measures every sample and stores the lengths."""
    lengths = np.zeros((len(dataset), 2), dtype=np.int32)
    done = 0
    with ProgressBar("measuring samples", len(dataset), silent=len(dataset) <= _CHUNK) as bar:
        for chunk in _chunks(dataset, workers):
            # chunks come in order, however many processes measure
            lengths[done : done + len(chunk)] = chunk
            done += len(chunk)
            bar.update(len(chunk))
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, lengths)
    return lengths


def _read(path: Path, count: int) -> np.ndarray | None:
    """The stored lengths; None where there are none that can be used."""
    try:
        lengths = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):  # missing or damaged: it is measured and written again
        return None
    return lengths if lengths.shape == (count, 2) and lengths.dtype == np.int32 else None


def _chunks(dataset: MeasuredDataset, workers: int) -> Iterator[np.ndarray]:
    spans = [(start, min(start + _CHUNK, len(dataset))) for start in range(0, len(dataset), _CHUNK)]
    if workers < 1 or len(dataset) <= _ALONE:
        yield from (_measure(dataset, span) for span in spans)
        return
    measure: Callable[[MeasuredDataset, tuple[int, int]], np.ndarray] = _measure
    pool = WorkerPool(measure, dataset, workers)
    try:
        yield from pool.map(spans)
    finally:
        pool.close()


def _measure(dataset: MeasuredDataset, span: tuple[int, int]) -> np.ndarray:
    return np.array([dataset.measure(index) for index in range(*span)], dtype=np.int32).reshape(-1, 2)
