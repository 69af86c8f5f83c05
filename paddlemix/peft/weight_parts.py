"""Which part of each array of a quantised weight a process of a tensor group has.

A weight is quantised whole and each process keeps a part of the arrays, so that every decoded number is that of one
process:

    array                            outputs are split    inputs are split
    weight_codes, weight_values      own outputs          own inputs
    weight_scale (int8)              own outputs          whole
    weight_scale_codes (nf4)         own outputs          own blocks of 64 inputs
    steps and offset (nf4)           whole                whole

A step belongs to 256 blocks of the whole weight, which need not fall on parts: so a part keeps all steps, one per
16,384 weights, and finds the step of a block by the block's place in the whole.  Knows arrays only, no process and no
layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from paddlemix.parallel.tensor.parts import Part
from paddlemix.peft.quantized_weight import NF4_BLOCK, SCALE_GROUP, padded_size, stored_arrays

_WHOLE_EVERYWHERE = ("weight_scale_steps", "weight_scale_offset")


class ScalePlaces(NamedTuple):
    """Where the nf4 blocks of a part are among those of the whole weight, counted output by output.

    Args:
        first: place of the part's first block.
        row: blocks of an output of the whole: from there it is so far to the same block of the next output.
    """

    first: int
    row: int

    def groups(self, outputs: slice, blocks: int) -> np.ndarray:
        """int32 [outputs * blocks]: which step each block of some outputs of the part has.

        Args:
            outputs: of the part.
            blocks: of an output of the part.
        """
        rows = self.first + self.row * np.arange(outputs.start, outputs.stop)
        return ((rows[:, None] + np.arange(blocks)) // SCALE_GROUP).astype(np.int32).reshape(-1)


def scale_places(shape: tuple[int, int], part: Part | None) -> ScalePlaces:
    """Where the nf4 blocks of a part are.

    Args:
        shape: (in, out) of the whole weight.
        part: of the weight [in, out]; None for the whole.
    """
    row = padded_size(shape[0]) // NF4_BLOCK
    if part is None:
        return ScalePlaces(0, row)
    return ScalePlaces(part.start * row if part.axis == 1 else part.start // NF4_BLOCK, row)


def falls_on_blocks(part: Part) -> bool:
    """Whether a part of a weight [in, out] has whole nf4 blocks only."""
    ends = (part.start,) if part.stop == part.size else (part.start, part.stop)
    return part.axis == 1 or not any(end % NF4_BLOCK for end in ends)


@dataclass(frozen=True, kw_only=True)
class SplitArray:
    """One array of a quantised weight, and how parts of the weight divide it.

    Args:
        dtype: numpy's; bfloat16 is uint16.
        whole: its shape in files, where it is whole.
        grid: the shape that is divided, [out, in / unit] or [out]; where `whole` has more numbers, they are zeros at
            the end.  None: every process has the whole.
        unit: inputs that share a number.
    """

    dtype: np.dtype
    whole: tuple[int, ...]
    grid: tuple[int, ...] | None = None
    unit: int = 1

    def part(self, of_weight: Part | None) -> Part | None:
        """The part of the grid that belongs to a part of the weight [in, out]; None where that is the whole array."""
        if of_weight is None or self.grid is None:
            return None
        if of_weight.axis == 1:
            return Part(axis=0, start=of_weight.start, stop=of_weight.stop, size=self.grid[0])
        if len(self.grid) == 1:
            return None
        # The last block of nf4 is filled up after the weight's end.
        stop = self.grid[1] if of_weight.stop == of_weight.size else of_weight.stop // self.unit
        return Part(axis=1, start=of_weight.start // self.unit, stop=stop, size=self.grid[1])

    def shape(self, of_weight: Part | None) -> tuple[int, ...]:
        """Of the array that belongs to a part of the weight."""
        part = self.part(of_weight)
        if part is None or self.grid is None:
            return self.whole
        return (*self.grid[: part.axis], part.stop - part.start, *self.grid[part.axis + 1 :])

    def cut(self, array: np.ndarray, of_weight: Part | None) -> np.ndarray:
        """What belongs to a part of the weight, of the whole array; of a mapped file nothing else is read."""
        part = self.part(of_weight)
        if part is None or self.grid is None:
            return array
        grid = array.reshape(-1)[: math.prod(self.grid)].reshape(self.grid)
        return np.ascontiguousarray(part.cut(grid))

    def joined(self, pieces: Sequence[np.ndarray], axis: int) -> np.ndarray:
        """The whole array.

        Args:
            pieces: of all parts of the weight, in the order of their places.
            axis: along which parts of the grid follow each other.
        """
        array = np.zeros(math.prod(self.whole), self.dtype)
        assert self.grid is not None
        np.concatenate(pieces, axis=axis, out=array[: math.prod(self.grid)].reshape(self.grid))
        return array.reshape(self.whole)


def split_arrays(kind: str, shape: tuple[int, int]) -> dict[str, SplitArray]:
    """Name -> array of a weight in one of the formats of `quantized_weight`.

    Args:
        shape: (in, out) of the whole weight.

    Raises:
        UserError: unknown kind.
    """
    in_features, out_features = shape
    blocks = padded_size(in_features) // NF4_BLOCK
    result = {}
    for name, (dtype, whole) in stored_arrays(kind, in_features, out_features).items():
        grid: tuple[int, ...] | None = None if name in _WHOLE_EVERYWHERE else whole
        unit = 2 if kind == "nf4" else 1  # two codes in a byte
        if name == "weight_scale_codes":
            grid, unit = (out_features, blocks), NF4_BLOCK
        result[name] = SplitArray(dtype=dtype, whole=whole, grid=grid, unit=unit)
    return result
