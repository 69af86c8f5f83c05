"""Batches for the Trainer: as tensors, with what a whole optimiser step needs to know.

Order is that of `EpochBatchSampler`, so a run that is taken up again goes on at its next batch and reads none before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from paddlemix.datasets.batches import BatchMaker, LoadingSettings, RowDataset
from paddlemix.datasets.order import EpochBatchSampler
from paddlemix.models.attention import SegmentLengths, packed_segments
from paddlemix.sample import Batch
from paddlemix.trainer.device_copies import on_device, one_ahead

Inputs = dict[str, Any]
_TENSORS = (
    *("input_ids", "position_ids", "pixel_values", "tile_features", "tile_order", "merge_index"),
    *("loss_index", "loss_targets"),
)


@dataclass
class PositionCounts:
    """What the positions held that were handed out so far.

    Args:
        positions: all, padding included.
        tokens: those that are no padding.
        visual: tokens that stand for a part of an image.
    """

    positions: int = 0
    tokens: int = 0
    visual: int = 0

    @property
    def padding_share(self) -> float:
        """Padding among all positions, 0..1."""
        return (self.positions - self.tokens) / max(self.positions, 1)

    @property
    def visual_share(self) -> float:
        """Visual tokens among all tokens, 0..1."""
        return self.visual / max(self.tokens, 1)

    def add(self, batch: Batch) -> None:
        """Counts a batch."""
        self.positions += batch.segment_ids.size
        self.tokens += int((batch.segment_ids > 0).sum())
        self.visual += batch.num_visual

    def since(self, earlier: PositionCounts) -> PositionCounts:
        """What was added since an earlier count."""
        return PositionCounts(
            self.positions - earlier.positions, self.tokens - earlier.tokens, self.visual - earlier.visual
        )


class BatchLoader:
    """Iterates over the micro-batches of one epoch after the other; worker processes serve all of them.

    Args:
        dataset: gives rows by index.
        sampler: which indices form a batch.
        settings: how batches are made.
        total_over_ranks: turns this process's number of supervised tokens in a step into that of all processes.

    Attributes:
        counts: positions of the micro-batches handed out so far, on this process.
    """

    def __init__(
        self,
        dataset: RowDataset,
        sampler: EpochBatchSampler,
        settings: LoadingSettings,
        total_over_ranks: Callable[[int], int] = lambda count: count,
    ) -> None:
        self.sampler, self.counts = sampler, PositionCounts()
        self._maker = BatchMaker(dataset, settings)
        self._total_over_ranks = total_over_ranks
        self._next_epoch, self._skip = 0, 0

    def __len__(self) -> int:
        """Micro-batches of an epoch."""
        return len(self.sampler)

    def start_at(self, step: int) -> None:
        """Makes the next iteration go on behind `step` optimiser steps; its skipped batches come as None."""
        self._next_epoch, in_epoch = divmod(step, self.sampler.steps_per_epoch)
        self._skip = in_epoch * self.sampler.accumulation

    def __iter__(self) -> Iterator[Inputs | None]:
        """Model inputs of each micro-batch, with the `num_supervised` of its whole optimiser step."""
        self.sampler.epoch, skip = self._next_epoch, self._skip
        self._next_epoch, self._skip = self._next_epoch + 1, 0
        yield from [None] * skip
        for batch, inputs in one_ahead(self._made(skip)):
            self.counts.add(batch)
            yield inputs

    def _made(self, skip: int) -> Iterator[tuple[Batch, Inputs]]:
        """Batches behind the first `skip` of an epoch, with their inputs."""
        window: list[Batch] = []
        for batch in self._maker.batches(list(self.sampler)[skip:]):
            window.append(batch)
            if len(window) == self.sampler.accumulation:
                total = self._total_over_ranks(sum(len(item.loss_index) for item in window))
                for item in window:
                    yield item, {**batch_inputs(item), "num_supervised": total}
                window = []

    def close(self) -> None:
        """Ends the worker processes."""
        self._maker.close()


def batch_inputs(batch: Batch) -> Inputs:
    """Model inputs of a batch as tensors on the current device, and what the trainer wants to know of it: `num_tokens`
    (padding not counted), `sources`, `skipped` and `tile_keys`.

    `segment_ids` is among them only where rows hold several samples, see `packed_segments`; a row of one sample needs
    none.
    """
    arrays = {name: getattr(batch, name) for name in _TENSORS if getattr(batch, name) is not None}
    segments = packed_segments(batch.segment_ids)
    if isinstance(segments, np.ndarray):
        arrays["segment_ids"] = segments
    inputs: Inputs = {**on_device(arrays)}
    if isinstance(segments, SegmentLengths):
        inputs["segment_ids"] = segments
    num_tokens = int((batch.segment_ids > 0).sum())
    told = {"sources": batch.sources, "skipped": batch.skipped, "tile_keys": batch.tile_keys}
    return {**inputs, **told, "num_tokens": num_tokens}
