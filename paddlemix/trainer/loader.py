"""Batches for the Trainer: as tensors, with what a whole optimiser step needs to know.

Order is that of `EpochBatchSampler`, so a run that is taken up again goes on at its next batch and reads none before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import paddle

from paddlemix.datasets.loading import ExampleDataset, LoadingSettings, iterate_batches
from paddlemix.datasets.mixture import EpochBatchSampler
from paddlemix.sample import Batch

Inputs = dict[str, Any]
_TENSORS = ("input_ids", "position_ids", "pixel_values", "merge_index", "loss_index", "loss_targets")


class BatchLoader:
    """Iterates over the micro-batches of one epoch after the other.

    Args:
        dataset: gives examples by index.
        sampler: which indices form a batch.
        settings: how batches are made.
        total_over_ranks: turns this process's number of supervised tokens in a step into that of all processes.
    """

    def __init__(
        self,
        dataset: ExampleDataset,
        sampler: EpochBatchSampler,
        settings: LoadingSettings,
        total_over_ranks: Callable[[int], int] = lambda count: count,
    ) -> None:
        self.dataset, self.sampler, self.settings = dataset, sampler, settings
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
        window: list[Batch] = []
        for batch in iterate_batches(self.dataset, list(self.sampler)[skip:], self.settings):
            window.append(batch)
            if len(window) == self.sampler.accumulation:
                total = self._total_over_ranks(sum(len(item.loss_index) for item in window))
                yield from ({**batch_inputs(item), "num_supervised": total} for item in window)
                window = []


def batch_inputs(batch: Batch) -> Inputs:
    """Model inputs of a batch as tensors on the current device, its `num_tokens` (padding not counted) and `sources`.

    `segment_ids` is among them only where rows hold several samples; a row of one sample needs none.
    """
    names = [name for name in _TENSORS if getattr(batch, name) is not None]
    if batch.segment_ids.max() > 1:
        names.append("segment_ids")
    inputs: Inputs = {name: paddle.to_tensor(getattr(batch, name)) for name in names}
    return {**inputs, "num_tokens": int((batch.segment_ids > 0).sum()), "sources": batch.sources}
