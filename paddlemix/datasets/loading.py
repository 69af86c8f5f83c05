"""Batches made ahead of the step that needs them: by a thread, or by worker processes that never load paddle.

Knows nothing of order or steps; it is given the rows of each batch.
"""

from __future__ import annotations

import multiprocessing
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from paddlemix.datasets.collate import collate
from paddlemix.sample import Batch, Example

_AHEAD = 2  # batches that are ready before they are asked for, per producer


class ExampleDataset(Protocol):
    """Anything that gives examples by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True)
class LoadingSettings:
    """How batches are made.

    Args:
        tokens_per_tile: feature rows that the tower gives for a tile.
        dummy_tile: shape [1, 3, H, W] of an unused tile for a batch without image, so that every process of a
            distributed run computes the same layers; None to leave such batches alone.
        num_workers: processes that make batches; 0 uses a thread of this process.
    """

    tokens_per_tile: int
    dummy_tile: tuple[int, ...] | None = None
    num_workers: int = 0


def make_batch(dataset: ExampleDataset, rows: Sequence[int], settings: LoadingSettings) -> Batch:
    """Encodes and collates the samples of one batch."""
    batch = collate([dataset[row] for row in rows], settings.tokens_per_tile)
    if batch.pixel_values is not None or settings.dummy_tile is None:
        return batch
    own_tokens = np.arange(batch.input_ids.size, dtype=np.int64)  # every position keeps its token: the tile is not used
    return replace(batch, pixel_values=np.zeros(settings.dummy_tile, dtype=np.float32), merge_index=own_tokens)


def iterate_batches(
    dataset: ExampleDataset, batches: Iterable[Sequence[int]], settings: LoadingSettings
) -> Iterator[Batch]:
    """Makes batches in order, ahead of their use.

    Args:
        batches: the rows of each batch.

    Raises:
        UserError: what encoding a sample raised, when its batch is asked for.
    """
    if settings.num_workers:
        return _by_processes(dataset, batches, settings)
    return _by_thread(make_batch(dataset, rows, settings) for rows in batches)


def _by_thread(batches: Iterator[Batch]) -> Iterator[Batch]:
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(_AHEAD)
    stopped = threading.Event()

    def produce() -> None:
        last: BaseException | None = None
        try:
            for batch in batches:
                if not _put(ready, batch, stopped):
                    return
        except BaseException as error:  # handed to the consumer, which raises it
            last = error
        _put(ready, last, stopped)

    threading.Thread(target=produce, daemon=True).start()
    try:
        while True:
            item = ready.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()


def _put(
    ready: queue.Queue[Batch | BaseException | None], item: Batch | BaseException | None, stopped: threading.Event
) -> bool:
    """Waits for room; False when the consumer has gone."""
    while not stopped.is_set():
        try:
            ready.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False


_worker: tuple[ExampleDataset, LoadingSettings] | None = None


def _start_worker(dataset: ExampleDataset, settings: LoadingSettings) -> None:
    global _worker
    _worker = (dataset, settings)


def _work(rows: Sequence[int]) -> Batch:
    assert _worker is not None
    return make_batch(_worker[0], rows, _worker[1])


def _by_processes(
    dataset: ExampleDataset, batches: Iterable[Sequence[int]], settings: LoadingSettings
) -> Iterator[Batch]:
    # "spawn": a fork of a process whose paddle threads are running can hang
    pool = ProcessPoolExecutor(
        settings.num_workers, multiprocessing.get_context("spawn"), _start_worker, (dataset, settings)
    )
    waiting: deque[Future[Batch]] = deque()
    try:
        for rows in batches:
            waiting.append(pool.submit(_work, rows))
            if len(waiting) > settings.num_workers * _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
