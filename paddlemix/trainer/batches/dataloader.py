"""Batches for the Trainer: as tensors, with what a whole optimiser step needs to know.

Order is that of `EpochBatchSampler`, so a resumed run continues at its next batch and reads none before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from paddlemix.datasets.batches import BatchMaker, LoadingSettings, RowDataset
from paddlemix.datasets.order import EpochBatchSampler
from paddlemix.models.attention import SegmentLengths, packed_segments
from paddlemix.sample import Batch
from paddlemix.trainer.batches.device_copies import on_device, one_ahead

Inputs = dict[str, Any]
DATA_FAILED = -1  # in place of a number of tokens
_TENSORS = (
    *("input_ids", "position_ids", "pixel_values", "tile_features", "tile_order", "merge_index"),
    *("loss_index", "loss_targets"),
)
_NOT_FOR_THE_MODEL = ("num_supervised", "num_tokens", "sources", "skipped", "tile_keys")


@dataclass
class PositionCounts:
    """What the positions of all batches so far held.

    Args:
        positions: all, padding included.
        tokens: those that are not padding.
        visual: tokens that represent a part of an image.
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

    def add_counts(self, other: PositionCounts) -> None:
        """Adds what other batches held."""
        self.positions += other.positions
        self.tokens += other.tokens
        self.visual += other.visual

    def since(self, earlier: PositionCounts) -> PositionCounts:
        """What was added since an earlier count."""
        return PositionCounts(
            self.positions - earlier.positions, self.tokens - earlier.tokens, self.visual - earlier.visual
        )


class Others(Protocol):
    """The other processes, as a loader needs them."""

    def data_failed(self, error: Exception) -> None:
        """Raises `error`, after they have been told."""


class BatchLoader:
    """Iterates over the micro-batches of one epoch after the other; worker processes serve all of them.

    Args:
        dataset: rows by index.
        sampler: which indices form a batch.
        settings: how batches are made.
        others: the other processes of the run, which have to know of a step's tokens, or of its data's failure, before
            it begins; None where there are none.

    Attributes:
        counts: positions of the micro-batches so far, on this process.
        upcoming: supervised tokens of the steps that are made and have not begun, on this process; -1 for one whose
            data failed.  With other processes the next step's are there before a step ends, unless its epoch does.
    """

    def __init__(
        self,
        dataset: RowDataset,
        sampler: EpochBatchSampler,
        settings: LoadingSettings,
        others: Others | None = None,
    ) -> None:
        self.sampler, self.counts, self.upcoming = sampler, PositionCounts(), deque[int]()
        self._maker = BatchMaker(dataset, settings)
        self._others = others
        self._next_epoch, self._skip = 0, 0

    def __len__(self) -> int:
        """Micro-batches of an epoch."""
        return len(self.sampler)

    def start_at(self, step: int) -> None:
        """Makes the next iteration continue after `step` optimiser steps; the batches before come as None."""
        # An epoch's order depends on seed and epoch alone, so the place in it is all there is to restore.
        self._next_epoch, in_epoch = divmod(step, self.sampler.steps_per_epoch)
        self._skip = in_epoch * self.sampler.accumulation

    def __iter__(self) -> Iterator[Inputs | None]:
        """Model inputs of each micro-batch, with this process's `num_supervised` of its whole optimiser step."""
        self.sampler.epoch, skip = self._next_epoch, self._skip
        self.upcoming.clear()
        self._next_epoch, self._skip = self._next_epoch + 1, 0
        # PaddleNLP's loop counts every batch of an epoch and skips the first ones itself: nothing is read for them.
        yield from [None] * skip
        try:
            for number, (batch, inputs) in enumerate(one_ahead(self._made(skip), always=self._others is not None)):
                if number % self.sampler.accumulation == 0:
                    self.upcoming.popleft()
                self.counts.add(batch)
                yield inputs
        except Exception as error:
            # Any other error, such as no memory on the device for a batch, was not announced: the others have begun the
            # step, so telling them here would wait for messages that they do not send.
            if self._others is not None and DATA_FAILED in self.upcoming:
                self._others.data_failed(error)
            raise

    def _made(self, skip: int) -> Iterator[tuple[Batch, Inputs]]:
        """Batches after the first `skip` of an epoch, with their inputs."""
        # All micro-batches of a step are made before its first runs: the divisor of their losses is the whole step's.
        for window in self._windows(skip):
            total = sum(len(item.loss_index) for item in window)
            self.upcoming.append(total)
            for item in window:
                yield item, {**batch_inputs(item), "num_supervised": total}

    def _windows(self, skip: int) -> Iterator[list[Batch]]:
        """The micro-batches of one step after the other."""
        window: list[Batch] = []
        try:
            for batch in self._maker.batches(list(self.sampler)[skip:]):
                window.append(batch)
                if len(window) == self.sampler.accumulation:
                    yield window
                    window = []
        except Exception:
            self.upcoming.append(DATA_FAILED)
            raise

    def close(self) -> None:
        """Ends the worker processes."""
        self._maker.close()


def batch_inputs(batch: Batch) -> Inputs:
    """Model inputs of a batch as tensors on the current device, and what the trainer needs of it besides: `num_tokens`
    (padding not counted), `sources`, `skipped` and `tile_keys`.

    `segment_ids` is among them only where rows hold several samples, see `packed_segments`; a row of one sample needs
    none.
    """
    arrays = {name: getattr(batch, name) for name in _TENSORS if getattr(batch, name) is not None}
    # None for one sample a row, lengths where the kernel takes them, else an array [B, L] for the mask.
    segments = packed_segments(batch.segment_ids)
    if isinstance(segments, np.ndarray):
        arrays["segment_ids"] = segments
    inputs: Inputs = {**on_device(arrays)}
    if isinstance(segments, SegmentLengths):
        inputs["segment_ids"] = segments
    # On the host, where the segments are: a sum on the device would have to be waited for.
    num_tokens = int((batch.segment_ids > 0).sum())
    besides = {"sources": batch.sources, "skipped": batch.skipped, "tile_keys": batch.tile_keys}
    return {**inputs, **besides, "num_tokens": num_tokens}


def model_inputs(inputs: Inputs) -> Inputs:
    """Those of a batch's values that the model takes."""
    return {key: value for key, value in inputs.items() if key not in _NOT_FOR_THE_MODEL}
