"""Batches made ahead of the step that needs them: by a thread, or by worker processes that never load paddle.

Knows nothing of order or steps; it is given the rows of each batch.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from paddlemix.datasets.collate import collate
from paddlemix.datasets.workers import WorkerPool
from paddlemix.sample import Batch, Row

_AHEAD = 2  # batches that the thread makes before they are asked for


class RowDataset(Protocol):
    """Anything that returns rows by index: of one example, of several that were packed, or of none."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...


@dataclass(frozen=True)
class LoadingSettings:
    """How batches are made.

    Args:
        tokens_per_tile: feature rows that the tower computes for a tile.
        dummy_tile: shape [1, 3, H, W] of a blank tile for a batch without an image, so that every batch computes the
            same layers; None to leave such batches alone.
        num_workers: processes that make batches; 0 uses a thread of this process.
        pad_to_multiple_of, pad_tiles_to_multiple_of: see `collate`.
    """

    tokens_per_tile: int
    dummy_tile: tuple[int, ...] | None = None
    num_workers: int = 0
    pad_to_multiple_of: int = 1
    pad_tiles_to_multiple_of: int = 1


def make_batch(dataset: RowDataset, rows: Sequence[int], settings: LoadingSettings) -> Batch:
    """Encodes and collates the rows of one batch."""
    found = [dataset[row] for row in rows]
    batch = collate(
        found,
        settings.tokens_per_tile,
        pad_to_multiple_of=settings.pad_to_multiple_of,
        pad_tiles_to_multiple_of=settings.pad_tiles_to_multiple_of,
    )
    # A batch without an image would skip the tower and the projector.  With a blank tile, whose features nobody reads,
    # they have a gradient of zero: AdamW counts the step, and of several processes none waits for the others' layers.
    # Source: LLaVA llava/train/train.py, `LazySupervisedDataset.__getitem__`.
    if batch.merge_index is not None or settings.dummy_tile is None:
        return batch
    # position i gathers row i of the embeddings: the dummy tile's features are computed and read by nobody
    own_tokens = np.arange(batch.input_ids.size, dtype=np.int64)  # every position keeps its token: the tile is not used
    tiles = np.zeros((settings.pad_tiles_to_multiple_of, *settings.dummy_tile[1:]), dtype=np.float32)
    return replace(batch, pixel_values=tiles, merge_index=own_tokens)


class BatchMaker:
    """Makes batches of one data set, ahead of their use.

    Its worker processes start with the first batch and serve every later `batches`; `close` ends them, and so does
    dropping the maker.

    Args:
        dataset: has to survive pickling where there are workers.
        settings: how batches are made.
    """

    def __init__(self, dataset: RowDataset, settings: LoadingSettings) -> None:
        self._dataset, self._settings = dataset, settings
        self._pool: WorkerPool[tuple[RowDataset, LoadingSettings], list[int], Batch] | None = None
        if settings.num_workers:
            self._pool = WorkerPool(_make_in_worker, (dataset, settings), settings.num_workers)

    def batches(self, rows: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """Batches in order.

        Args:
            rows: the rows of each batch; it may have no end.

        Raises:
            UserError: what encoding a sample raised, when its batch is asked for; or a worker process ended.
        """
        if self._pool is not None:
            # workers: Python code runs in parallel and results are copied;  a thread: nothing is copied
            return self._pool.map(list(batch) for batch in rows)
        return _by_thread(make_batch(self._dataset, batch, self._settings) for batch in rows)

    def close(self) -> None:
        """Ends the worker processes; the maker can be used again."""
        if self._pool is not None:
            self._pool.close()


def iterate_batches(
    dataset: RowDataset, batches: Iterable[Sequence[int]], settings: LoadingSettings
) -> Iterator[Batch]:
    """Batches of one pass, in order, made ahead of their use; see `BatchMaker`, whose workers it starts and ends.

    Args:
        batches: the rows of each batch.

    Raises:
        UserError: see `BatchMaker.batches`.
    """
    maker = BatchMaker(dataset, settings)
    try:
        yield from maker.batches(batches)
    finally:
        maker.close()


def _make_in_worker(context: tuple[RowDataset, LoadingSettings], rows: list[int]) -> Batch:
    dataset, settings = context
    return make_batch(dataset, rows, settings)


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

    # One thread is enough: decoding and numpy release the interpreter, and order needs no bookkeeping.
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
    # Polled, because a queue cannot be woken: a consumer that left would else keep the thread, and its batch, for ever.
    while not stopped.is_set():
        try:
            ready.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False
