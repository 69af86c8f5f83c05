"""Operators that a CPU computes fastest in one form and accelerators compute rightly in another.

The CPU's forms: a sum is a product with ones, because paddle's reductions over the last axis run on one thread there.
Under autocast such a product leaves in half precision, where a sum of squares overflows, and a float32 product may be
rounded to TF32; so elsewhere a reduction is a reduction.  The other forms avoid operators that the Ascend plugin lacks
in bfloat16, or that are wrong there: its `gather` has no gradient for repeated indices, and its `dropout` draws on the
host, from a generator that recomputation does not restore.

Source: the operators that PaddleCustomDevice registers for NPU, by type (October 2024).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import paddle
from paddle.nn import functional

from paddlemix.models.kernels.cached_constants import cached_constant


def on_cpu(tensor: paddle.Tensor) -> bool:
    """Whether a tensor is in the host's memory."""
    return bool(tensor.place.is_cpu_place())


def row_sums(numbers: paddle.Tensor) -> paddle.Tensor:
    """float32 [..., n] -> [..., 1], in float32 whatever autocast does."""
    # with ones [n, 1]; paddle's sum over the last axis runs on one thread on CPU
    if on_cpu(numbers):
        return paddle.matmul(numbers, paddle.ones([numbers.shape[-1], 1]))
    return numbers.sum(axis=-1, keepdim=True)


def column_sums(numbers: paddle.Tensor) -> paddle.Tensor:
    """float32 [rows, n] -> [n], in float32 whatever autocast does."""
    if on_cpu(numbers):
        return paddle.matmul(paddle.ones([1, numbers.shape[0]]), numbers).reshape([-1])
    return numbers.sum(axis=0)


def take_rows(rows: paddle.Tensor, index: paddle.Tensor) -> paddle.Tensor:
    """[n, D] and int64 [m] -> [m, D].  The gradient of a row that is taken several times is the sum of all of them."""
    return paddle.gather(rows, index) if on_cpu(rows) else functional.embedding(index, rows)


def difference(first: paddle.Tensor, second: paddle.Tensor) -> paddle.Tensor:
    """first - second, of equal types; by a sum off the CPU, since NPU subtracts no bfloat16."""
    return first - second if on_cpu(first) else first + second.scale(-1.0)


def repeat_heads(states: paddle.Tensor, groups: int) -> paddle.Tensor:
    """[B, S, K, E] -> [B, S, K * groups, E], each head `groups` times in a row."""
    if on_cpu(states):
        return states.repeat_interleave(groups, axis=2)
    batch, length, heads, width = states.shape
    # [B, S, K, E] -> [B, S, K, groups, E] -> [B, S, K * groups, E]
    return states.unsqueeze(3).expand([batch, length, heads, groups, width]).reshape([batch, length, -1, width])


def dropout(inputs: paddle.Tensor, rate: float) -> paddle.Tensor:
    """Zero with probability `rate`, else multiplied by 1 / (1 - rate)."""
    if on_cpu(inputs):
        return functional.dropout(inputs, rate, training=True)
    # drawn on the device itself, see above
    factors, gain = widened_mask(dropout_mask(inputs, Dropping(rate)), rate, inputs.dtype)
    return inputs * factors.scale_(gain)


class Dropping(NamedTuple):
    """What a layer's dropout draws.

    Args:
        rate: share that is dropped.
        width: of the layer's inputs where a process has only some of them, else 0.  All are drawn then, so that each
            has the mask that one process draws, and generators stay alike on processes with parts of several sizes.
        first: of the inputs that are here.
    """

    rate: float
    width: int = 0
    first: int = 0


def dropout_mask(inputs: paddle.Tensor, dropping: Dropping) -> paddle.Tensor:
    """bool, of the inputs' shape: what is left, drawn from the generator of the inputs' device."""
    width = inputs.shape[-1]
    drawn = [*inputs.shape[:-1], dropping.width or width]
    if on_cpu(inputs):
        numbers = functional.dropout(paddle.ones(drawn, dtype=inputs.dtype), dropping.rate, training=True)
    else:
        numbers = paddle.uniform(drawn, dtype="float32", min=0.0, max=1.0)
    if dropping.width:  # before they are compared: NPU slices numbers, not truth values
        numbers = numbers[..., dropping.first : dropping.first + width]
    return numbers > 0 if on_cpu(inputs) else numbers >= cached_constant(_number, dropping.rate)


def widened_mask(mask: paddle.Tensor, rate: float, dtype: paddle.dtype) -> tuple[paddle.Tensor, float]:
    """The factors of a `dropout_mask`, and what is left to multiply by: 0 or 1 / (1 - rate), and 1; on an accelerator 0
    or 1, and 1 / (1 - rate), which costs no operator where it joins another number."""
    gain = 1.0 / (1.0 - rate)
    return (mask.astype(dtype).scale_(gain), 1.0) if on_cpu(mask) else (mask.astype(dtype), gain)


def _number(value: float) -> np.ndarray:
    return np.array([value], dtype=np.float32)
