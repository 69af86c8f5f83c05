"""Which rows form each micro-batch of a rank: a function of seed, epoch and rank alone.

So a run can stop and go on at any step.  Knows no file and no sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from paddlemix.datasets.grouping import group_by_length, group_by_modality
from paddlemix.errors import UserError

Grouping = Literal["none", "modality", "length"]
_GROUPED: dict[str, Callable[[np.ndarray, int, int, np.random.Generator], np.ndarray]] = {
    "modality": group_by_modality,
    "length": group_by_length,
}


@dataclass
class EpochBatchSampler:
    """Which samples form each micro-batch of a rank, for one epoch after the other.

    Args:
        size: number of samples, >= 1.
        batch_size: samples in a micro-batch of one rank.
        accumulation: micro-batches that make one optimiser step.
        seed: of the permutations.
        rank, world_size: this process among those that share the data.
        shuffle: new order each epoch; False keeps the file's order.
        grouping: "modality" for steps of one modality, "length" for batches of like length, "none" mixes freely.
        lengths: int [size], what is grouped by: signed words (`grouping.count_words`) or tokens.

    Attributes:
        epoch: which pass over the data `__iter__` and `order` give; the caller sets it.

    The last step of an epoch takes samples from the epoch's beginning until it is full.

    Raises:
        UserError: `size` is 0.
    """

    size: int
    batch_size: int
    accumulation: int = 1
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    shuffle: bool = True
    grouping: Grouping = "none"
    lengths: np.ndarray | None = None
    epoch: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError("the data set is empty: no record in dataset.data_files")

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps that one pass over the data takes."""
        return -(-self.size // (self.batch_size * self.accumulation * self.world_size))

    def __len__(self) -> int:
        """Micro-batches of one epoch on one rank."""
        return self.steps_per_epoch * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        """Sample indices of each micro-batch of this rank in the current epoch."""
        order = self.order()
        per_round = self.batch_size * self.world_size
        for start in range(0, len(order), per_round):
            first = start + self.rank * self.batch_size
            yield order[first : first + self.batch_size].tolist()

    def order(self) -> np.ndarray:
        """int64 [len(self) * batch_size * world_size]: all ranks' samples of the current epoch, in order."""
        random = np.random.default_rng([self.seed, self.epoch])
        if self.lengths is not None and self.grouping != "none":
            group = _GROUPED[self.grouping]
            indices = group(self.lengths, self.batch_size, self.accumulation * self.world_size, random)
        else:
            indices = random.permutation(self.size) if self.shuffle else np.arange(self.size)
        total = len(self) * self.batch_size * self.world_size
        return np.resize(indices, total)
