"""The samples of a run come in one order, wherever it stops and goes on, however many ranks and workers share it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest

from paddlemix.datasets.batches import LoadingSettings, RowDataset
from paddlemix.datasets.order import EpochBatchSampler, Grouping
from paddlemix.datasets.packing import PackedDataset, pack_rows
from paddlemix.trainer.batches.dataloader import BatchLoader
from tests.rows import NumberedRows, mixed_lengths

COUNT = 1000  # sample ids that are compared
STEP = 12  # rows of an optimiser step, over ranks and accumulation
LENGTHS = mixed_lengths(437)
SAMPLES = NumberedRows(LENGTHS)
WAYS = ("mixed", "modality", "length", "packed")
KINDS: dict[str, tuple[Grouping, np.ndarray | None]] = {
    "mixed": ("none", None),
    "modality": ("modality", np.where(np.arange(437) % 3, LENGTHS, -LENGTHS)),
    "length": ("length", LENGTHS),
    "packed": ("none", None),
}


def rows_of(way: str) -> RowDataset:
    return PackedDataset(SAMPLES, pack_rows(LENGTHS, 24, seed=3)) if way == "packed" else SAMPLES


class Ranks:
    """One loader per rank over the same rows; loaders keep their workers from call to call."""

    def __init__(self, way: str, ranks: int, workers: int) -> None:
        grouping, lengths = KINDS[way]
        rows, settings = rows_of(way), LoadingSettings(tokens_per_tile=4, num_workers=workers)
        self.loaders = [
            BatchLoader(
                rows,
                EpochBatchSampler(len(rows), 3, 4 // ranks, 7, rank, ranks, grouping=grouping, lengths=lengths),
                settings,
            )
            for rank in range(ranks)
        ]

    def samples(self, step: int = 0) -> list[str]:
        """The first ids that all ranks together see from a step on, in order."""
        for loader in self.loaders:
            loader.start_at(step)
        micro_batches = zip(*(_sources(loader) for loader in self.loaders), strict=False)
        return list(islice((source for batch in micro_batches for rank in batch for source in rank), COUNT))

    def close(self) -> None:
        for loader in self.loaders:
            loader.close()


def _sources(loader: BatchLoader) -> Iterator[tuple[str, ...]]:
    """Sample ids of one micro-batch after the other, epoch after epoch."""
    while True:
        yield from (inputs["sources"] for inputs in loader if inputs is not None)


def expected(way: str, step: int) -> list[str]:
    """From the order of the epochs alone: no loader, no ranks, no resume."""
    grouping, lengths = KINDS[way]
    rows = rows_of(way)
    sampler = EpochBatchSampler(len(rows), 3, 4, seed=7, grouping=grouping, lengths=lengths)
    order: list[int] = []
    for sampler.epoch in range(COUNT // 100):
        order += sampler.order().tolist()
    return [example.source for row in order[step * STEP :] for example in rows[row].examples][:COUNT]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_order_is_the_same_after_a_resume(way: str, ranks: int) -> None:
    """An epoch of samples has 37 steps; the resumes are at its start, inside, at its end, and epochs later."""
    loaders = Ranks(way, ranks, workers=0)
    undisturbed = loaders.samples()
    assert undisturbed == expected(way, 0) and len(undisturbed) == COUNT
    for step in (0, 1, 5, 36, 37, 38, 80):
        assert loaders.samples(step) == expected(way, step), step


@pytest.mark.parametrize("way", ["length", "packed"])
def test_worker_processes_change_nothing(way: str) -> None:
    """The same four workers serve every call."""
    loaders = Ranks(way, 1, workers=4)
    for step in (0, 5, 38):
        assert loaders.samples(step) == expected(way, step), step
    loaders.close()


def test_two_ranks_with_workers_of_their_own() -> None:
    loaders = Ranks("mixed", 2, workers=2)
    assert loaders.samples(5) == expected("mixed", 5)
    loaders.close()


def test_what_is_lost_by_a_stop_is_nothing_and_what_is_seen_twice_is_nothing() -> None:
    """The first epoch, cut at any step, is each sample once."""
    whole = Ranks("length", 1, workers=0)
    first = whole.samples()[: 10 * STEP]
    rest = whole.samples(10)[: 437 - 10 * STEP]
    assert sorted(map(int, first + rest)) == list(range(437))
