"""Weights that are not read when a model is loaded, but when it is known which part of them this process keeps.

With sharding stage 3 no process that trains has the whole model: a large weight has a shape and no memory until its
slice is read.  What reads it comes from the one who loads the model.
"""

from __future__ import annotations

import math
from typing import Protocol

import paddle

LARGE = 2**20  # numbers of the largest weight that every process of stage 3 holds whole, as in Paddle


class Reader(Protocol):
    """Reads a weight, or a part of it, into a tensor."""

    def __call__(self, target: paddle.Tensor, part: tuple[int, int] | None) -> None:
        """Fills `target`.

        Args:
            target: of the weight's shape, or [length] for a part, which may be longer than it.
            part: which of the weight's numbers in their flat order; None for all.
        """


def is_large(weight: paddle.Tensor) -> bool:
    """Whether stage 3 slices a weight."""
    return math.prod(weight.shape) > LARGE


def has_memory(weight: paddle.Tensor) -> bool:
    """Whether a weight has numbers; without them only `defer` may be asked to give it some."""
    return bool(weight._is_initialized())


def defer(weight: paddle.Tensor, read: Reader) -> None:
    """Keeps how a weight without memory is to be read."""
    weight.deferred = read


def reader_of(weight: paddle.Tensor) -> Reader | None:
    """How a weight is to be read; None where it was read."""
    return getattr(weight, "deferred", None)
