"""Data sets that cost nothing, for tests of order, packing and worker processes.  Knows no paddle and no file."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

import numpy as np

from paddlemix.errors import UserError
from paddlemix.sample import IGNORE_INDEX, IMAGE_TOKEN_INDEX, NEWLINE_INDEX, Example, Row, Skip

PER_TILE = 4


def build_example(length: int, tiles: int, seed: int) -> Example:
    """Random ids, labels on random positions, and visual tokens that read random rows of `tiles` tiles of 2 x 2."""
    random = np.random.default_rng(seed)
    ids = random.integers(1, 400, length)
    visual = random.integers(0, 2, length).astype(bool) & (tiles > 0)
    ids[visual] = IMAGE_TOKEN_INDEX
    trained = random.integers(0, 2, length).astype(bool) & ~visual
    return Example(
        input_ids=ids,
        labels=np.where(trained, ids, IGNORE_INDEX),
        pixel_values=random.random((tiles, 3, 2, 2), dtype=np.float32),
        image_index=random.integers(NEWLINE_INDEX, max(tiles * PER_TILE, 1), int(visual.sum())),
        source=f"example {seed}",
    )


@dataclass
class NumberedRows:
    """Sample i has the source "i" and `lengths[i]` tokens, the last of them trained; length 0 is skipped.

    Args:
        lengths: int [n].
        bad: an index whose sample is an error.
        deadly: an index that kills the process that asks for it.
    """

    lengths: np.ndarray
    bad: int = -1
    deadly: int = -1
    fingerprint: str = "numbered"

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Row:
        length = self.measure(index)[0]
        if not length:
            return Row((), (Skip(index, f"{index}: empty"),))
        ids = np.full(length, 1 + index % 30)
        labels = np.full(length, IGNORE_INDEX)
        labels[-1] = ids[-1]
        return Row(
            (Example(input_ids=ids, labels=labels, pixel_values=_NO_TILE, image_index=_NO_INDEX, source=f"{index}"),)
        )

    def measure(self, index: int) -> tuple[int, int]:
        if index == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == self.bad:
            raise UserError(f"{index} is bad")
        return int(self.lengths[index]), int(self.lengths[index]) // 2


_NO_TILE = np.zeros((0, 3, 2, 2), dtype=np.float32)
_NO_INDEX = np.zeros(0, dtype=np.int64)


def mixed_lengths(count: int, seed: int = 0, skipped: int = 0) -> np.ndarray:
    """int64 [count], 2..12, `skipped` of them 0."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, 13, count)
    lengths[random.choice(count, skipped, replace=False)] = 0
    return lengths


def echo(context: object, item: object) -> tuple[object, object]:
    """For worker processes: gives back what it got."""
    return context, item


def process_number(context: object, item: object) -> int:
    """For worker processes: which one this is."""
    return os.getpid()
