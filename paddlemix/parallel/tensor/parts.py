"""Marks on the weights and layers of a model that a tensor group shares: which part this process has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import paddle
from paddle import nn


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some rows or columns of a whole tensor.

    Args:
        axis: that is split.
        start, stop: places along it that are held here; the processes of a group hold neighbouring parts, by rank.
        size: of the whole along it.
    """

    axis: int
    start: int
    stop: int
    size: int

    @property
    def places(self) -> slice:
        """The part as an index along its axis."""
        return slice(self.start, self.stop)

    def cut(self, whole: Any) -> Any:
        """This part of a whole tensor or array."""
        return whole[(slice(None),) * self.axis + (self.places,)]

    def along(self, axis: int) -> Part:
        """The same places along another axis, e.g. of a bias whose weight's columns these are."""
        return Part(axis=axis, start=self.start, stop=self.stop, size=self.size)


def mark(parameter: paddle.Tensor, part: Part | None) -> None:
    """Notes that a parameter is a part of a weight; nothing where `part` is None."""
    if part is not None:
        parameter.tensor_part = part
        parameter.is_distributed = True  # paddle's own mark of a parameter that differs from process to process


def part_of(parameter: paddle.Tensor) -> Part | None:
    """Which part of a weight a parameter is; None where it is whole."""
    return getattr(parameter, "tensor_part", None)


def whole_shape(parameter: paddle.Tensor) -> tuple[int, ...]:
    """The shape of the weight that a parameter is, or is a part of."""
    shape, part = list(parameter.shape), part_of(parameter)
    if part is not None:
        shape[part.axis] = part.size
    return tuple(shape)


def whole_sides(layer: nn.Layer, sides: Sequence[int]) -> tuple[int, int]:
    """Inputs and outputs of a linear layer as a whole.

    Args:
        sides: of the weight [in, out] that this process has, in whatever form.
    """
    part = linear_part(layer)
    if part is None:
        return sides[0], sides[1]
    return (part.size, sides[1]) if part.axis == 0 else (sides[0], part.size)


def mark_partial(parameter: paddle.Tensor) -> None:
    """Notes that every process of the group holds this weight whole, and computes a share of its gradient."""
    parameter.has_partial_gradient = True


def has_partial_gradient(parameter: paddle.Tensor) -> bool:
    """Whether a weight's gradient is the sum of those of all processes of the group."""
    return getattr(parameter, "has_partial_gradient", False)


def mark_linear(layer: nn.Layer, part: Part) -> None:
    """Notes which part of a linear layer this is, on the layer and its parameters.

    Args:
        layer: with a weight [in, out], or one that stores it in another form.
        part: of that weight.
    """
    layer.tensor_part = part
    weight = layer._parameters.get("weight")
    if weight is not None:
        mark(weight, part)
    bias = layer._parameters.get("bias")
    if bias is not None and part.axis == 1:
        mark(bias, part.along(0))


def linear_part(layer: nn.Layer) -> Part | None:
    """Which part of the weight [in, out] a plain, adapted or quantised linear layer has; None where it is whole."""
    return getattr(layer, "tensor_part", None)
