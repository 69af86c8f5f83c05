"""Which rows form each micro-batch of a rank: a function of seed, epoch and rank alone, so a run resumes at any step.

Rows that meet in a batch may be grouped: by modality, or by length.  Knows no file.

Sources: haotian-liu/LLaVA llava/train/llava_trainer.py, `get_modality_length_grouped_indices` (commit c121f04), where
one modality alone is grouped by length too; transformers trainer_pt_utils.py, `get_length_grouped_indices` (v4.55).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from paddlemix.errors import UserError
from paddlemix.sample import Sample

Grouping = Literal["none", "modality", "length"]
_STEPS_PER_SORT = 50  # Source: transformers, `mega_batch_mult`


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
        lengths: int [size], what is grouped by: signed words (`count_words`) or tokens.

    Attributes:
        epoch: which pass over the data `__iter__` and `order` return; the caller sets it.

    The last step of an epoch is filled with samples from the epoch's beginning.  Which samples a step has depends on
    `batch_size` x `accumulation` x `world_size` alone, and not on its factors.

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
        """Optimiser steps of one pass over the data."""
        return -(-self.size // (self.batch_size * self.accumulation * self.world_size))

    def __len__(self) -> int:
        """Micro-batches of one epoch on one rank."""
        return self.steps_per_epoch * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        """Sample indices of each micro-batch of this rank in the current epoch."""
        order = self.order()
        # neighbouring batches go to neighbouring ranks, so a step's samples are the same for any number of ranks
        per_round = self.batch_size * self.world_size
        for start in range(0, len(order), per_round):
            first = start + self.rank * self.batch_size
            yield order[first : first + self.batch_size].tolist()

    def order(self) -> np.ndarray:
        """int64 [len(self) * batch_size * world_size]: all ranks' samples of the current epoch, in order."""
        # A generator of its own for each epoch: nothing has to be stored to resume in the middle of one.
        random = np.random.default_rng([self.seed, self.epoch])
        total = len(self) * self.batch_size * self.world_size
        if self.lengths is not None and self.grouping != "none":
            batches = self.accumulation * self.world_size
            indices = _GROUPED[self.grouping](self.lengths, self.batch_size, batches, random)
            # Sorted, because the order within the first step depends on the size of a batch on one rank.
            first = np.sort(indices[: self.batch_size * batches])
            return np.concatenate([indices, np.resize(first, total - len(indices))])
        indices = random.permutation(self.size) if self.shuffle else np.arange(self.size)
        # `resize` repeats from the beginning, which fills the last step
        return np.resize(indices, total)


def count_words(sample: Sample) -> int:
    """Words of a conversation, `<image>` counted as one, at least 1; negative where there is no image."""
    words = sum(len(message.text.split()) + len(message.image_indices) for message in sample.messages)
    return max(words, 1) * (1 if sample.images else -1)


def group_by_modality(lengths: np.ndarray, batch_size: int, batches: int, random: np.random.Generator) -> np.ndarray:
    """Orders samples for steps of `batches` batches of `batch_size`; a step's batches are of like total length.

    Args:
        lengths: int [samples], see `count_words`; a bad record's 0 counts as text.
        batch_size: samples of one batch on one device.
        batches: batches of a whole optimiser step, over devices and accumulation.
        random: draws the order.

    Returns:
        Every index once.  Each full step has one modality; the samples left over from both come last.
    """
    full: list[np.ndarray] = []
    rest: list[np.ndarray] = []
    for members in (np.flatnonzero(lengths > 0), np.flatnonzero(lengths <= 0)):
        # Only whole steps of one modality are grouped; what is left over of both forms the mixed steps at the end.
        shuffled = random.permutation(members)
        whole = len(shuffled) - len(shuffled) % (batch_size * batches)
        rest.append(shuffled[whole:])
        full += [_balanced(step, lengths, batches) for step in shuffled[:whole].reshape(-1, batch_size * batches)]
    return np.concatenate([*(full[index] for index in random.permutation(len(full))), np.sort(np.concatenate(rest))])


def _balanced(step: np.ndarray, lengths: np.ndarray, batches: int) -> np.ndarray:
    """Deals the samples of a step, longest first, each to the batch that is shortest so far and not full."""
    room = len(step) // batches
    chunks: list[list[int]] = [[] for _ in range(batches)]
    totals = np.zeros(batches)
    for index in step[np.argsort(-np.abs(lengths[step]), kind="stable")]:
        chunk = int(totals.argmin())
        chunks[chunk].append(int(index))
        # a full batch is out of the game: its total becomes infinite
        totals[chunk] = totals[chunk] + abs(lengths[index]) if len(chunks[chunk]) < room else np.inf
    return np.array([index for chunk in chunks for index in chunk], dtype=np.int64)


def group_by_length(lengths: np.ndarray, batch_size: int, batches: int, random: np.random.Generator) -> np.ndarray:
    """Batches of samples of like length, so that little is padded, and steps whose batches are of like length, so that
    no device waits for another.

    The shuffled samples are sorted within groups of up to 50 steps, cut into steps, and the steps shuffled: what meets
    in a batch still changes from epoch to epoch.

    Args:
        lengths: int [samples], tokens; a sample of 0, which is skipped, is spread among the others.
        batch_size, batches, random: see `group_by_modality`.

    Returns:
        Every index once.  The samples of the last, incomplete step are drawn from all lengths.
    """
    step = batch_size * batches
    keys = _filled(np.abs(lengths), random)
    shuffled = random.permutation(len(keys))
    whole = len(shuffled) - len(shuffled) % step
    steps: list[np.ndarray] = []
    # Sorting all samples at once would make the same batches in every epoch.
    for group in np.array_split(shuffled[:whole].reshape(-1, step), max(-(-whole // (step * _STEPS_PER_SORT)), 1)):
        samples = group.reshape(-1)
        steps += list(samples[np.argsort(-keys[samples], kind="stable")].reshape(-1, step))
    rest = shuffled[whole:]
    rest = rest[np.argsort(-keys[rest], kind="stable")]
    return np.concatenate([*(steps[index] for index in random.permutation(len(steps))), rest])


def _filled(lengths: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The lengths with a drawn one in place of each 0, or there would be steps of nothing but skipped samples."""
    known = lengths[lengths > 0]
    if not len(known) or len(known) == len(lengths):
        return lengths
    return np.where(lengths > 0, lengths, random.choice(known, len(lengths)))


# grouping -> what orders the samples of an epoch
_GROUPED: dict[str, Callable[[np.ndarray, int, int, np.random.Generator], np.ndarray]] = {
    "modality": group_by_modality,
    "length": group_by_length,
}
