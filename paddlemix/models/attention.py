"""Attention over heads: masks, rotary positions and the product itself.

Rows that hold several samples are computed sample by sample on CPU and with a mask elsewhere; `packed_segments` is the
one place that chooses, and the one to change for a fused kernel that takes lengths.
Shapes: B batch, L query positions, S key positions, H query heads, K key/value heads, E head width.
Source: Vaswani et al. 2017; rotary positions as in transformers' Llama (halves, not pairs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import paddle

from paddlemix.models.kernels import AttentionFunction, RotaryFunction

RotaryTables = tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]
MASKED = -1e9  # added to a score that must not count; finite, so that a fully masked row stays finite
_CAUSAL_BLOCK = 128  # queries computed at a time on CPU, where what causality hides is then left out


@dataclass(frozen=True)
class SegmentLengths:
    """The samples of packed rows, known to the host: the batch's flat positions [B * L], cut into runs.

    Args:
        lengths: positions of each run, >= 1, adding up to B * L.  A row's padding is a run like a sample; no run goes
            over a row's end.
    """

    lengths: tuple[int, ...]


@dataclass(frozen=True)
class SegmentBiases:
    """Masks of the runs of packed rows.

    Args:
        lengths: see `SegmentLengths`.
        biases: length of a run -> what `attention_bias` gives for a sample of that length alone.
    """

    lengths: tuple[int, ...]
    biases: dict[int, paddle.Tensor | None]


Segments: TypeAlias = "paddle.Tensor | SegmentLengths"  # what a model takes as `segment_ids`
Bias: TypeAlias = "paddle.Tensor | SegmentBiases | None"


def rotary_tables(
    position_ids: paddle.Tensor, heads: int, head_size: int, theta: float, dtype: paddle.dtype
) -> RotaryTables:
    """What `rotate` needs: cosines, sines and the half turn.

    Cosines and sines are repeated for every head, because a product of equal shapes is many times faster on CPU.

    Args:
        position_ids: int64 [B, L].

    Returns:
        [B, L, heads, E] twice and [E, E], of `dtype`; angles are computed in float32.
    """
    exponents = paddle.arange(0, head_size, 2, dtype="float32") / head_size
    angles = position_ids.astype("float32").unsqueeze(-1) * (1.0 / theta**exponents)  # [B, L, E/2]
    angles = paddle.concat([angles, angles], axis=-1).unsqueeze(2)
    cosines, sines = (part.astype(dtype).tile([1, 1, heads, 1]) for part in (paddle.cos(angles), paddle.sin(angles)))
    return cosines, sines, paddle.to_tensor(_half_turn(head_size)).astype(dtype)


def _half_turn(size: int) -> np.ndarray:
    """float32 [size, size]: x @ it = concat(-second half of x, first half of x)."""
    identity = np.eye(size // 2, dtype=np.float32)
    zero = np.zeros_like(identity)
    return np.block([[zero, identity], [-identity, zero]])


def rotate(states: paddle.Tensor, tables: RotaryTables) -> paddle.Tensor:
    """Applies rotary positions to [B, L, heads, E].  The half turn is a product, whose gradient is one too: slicing and
    concatenating takes four times as long on CPU."""
    return RotaryFunction.apply(states, *tables)


def packed_segments(segment_ids: np.ndarray) -> Segments | None:
    """What the decoder takes as `segment_ids` for the rows of a training batch, in the form that is fast here.

    Args:
        segment_ids: int64 [B, L], see `paddlemix.sample.Batch`; padding stands on the right.

    Returns:
        None where every row is one sample, because padding behind it is never seen; for packed rows `SegmentLengths` on
        CPU, where scores that a mask throws away cost as much as those that count, and the ids as a tensor [B, L] on
        other devices, whose kernels want few large products.
    """
    if segment_ids.max(initial=0) <= 1:
        return None
    if paddle.get_device() != "cpu":
        return paddle.to_tensor(segment_ids)
    first = np.ones(segment_ids.shape, dtype=bool)
    first[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = np.flatnonzero(first)
    return SegmentLengths(tuple(np.diff(starts, append=segment_ids.size).tolist()))


def attention_bias(
    query_length: int, key_length: int, query_segments: Segments | None, key_segments: Segments | None
) -> Bias:
    """What is added to the scores: 0 where a query may look, else `MASKED`.

    Args:
        query_segments, key_segments: int64 [B, L] and [B, S], or twice the same `SegmentLengths`, of rows without a
            cache; a query sees only keys of its own segment. None where every row is one sample that begins at
            position 0.

    Returns:
        float32 [L, S] or [B, 1, L, S] (`MASKED` is infinite in float16), or None when nothing is masked; for
        `SegmentLengths` one [n, n] for every n among the lengths.  On CPU a matrix is added ten times faster than the
        same with leading axes of 1.

    Raises:
        ValueError: only one of the two is `SegmentLengths`, or they differ.
    """
    if isinstance(query_segments, SegmentLengths) or isinstance(key_segments, SegmentLengths):
        if not isinstance(query_segments, SegmentLengths) or query_segments is not key_segments:
            raise ValueError("SegmentLengths are of whole rows without a cache; give segment ids as a tensor")
        lengths = query_segments.lengths
        return SegmentBiases(lengths, {length: attention_bias(length, length, None, None) for length in set(lengths)})
    allowed = None
    if query_length > 1:
        queries = paddle.arange(key_length - query_length, key_length).unsqueeze(-1)
        allowed = paddle.arange(key_length).unsqueeze(0) <= queries  # [L, S]
    if query_segments is not None and key_segments is not None:
        same = (query_segments.unsqueeze(-1) == key_segments.unsqueeze(-2)).unsqueeze(1)  # [B, 1, L, S]
        allowed = same if allowed is None else paddle.logical_and(allowed, same)
    if allowed is None:
        return None
    return (1.0 - allowed.astype("float32")) * MASKED


def attend(queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor, bias: Bias) -> paddle.Tensor:
    """Softmax attention.

    Args:
        queries: [B, L, H, E]; keys, values: [B, S, K, E] with H a multiple of K.
        bias: see `attention_bias`.

    Returns:
        [B, L, H * E].
    """
    batch, length, heads, head_size = queries.shape
    groups = heads // keys.shape[2]
    if groups > 1:
        keys, values = (states.repeat_interleave(groups, axis=2) for states in (keys, values))
    if isinstance(bias, SegmentBiases):
        merged = _attend_by_segment(queries, keys, values, bias)
    else:
        merged = _attend_all(queries, keys, values, bias)
    return merged.reshape([batch, length, heads * head_size])


def _attend_by_segment(
    queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor, bias: SegmentBiases
) -> paddle.Tensor:
    """Each run of the flat positions on its own; [B, L, H, E] three times -> [1, B * L, H, E].

    A split's gradient is one concatenation; that of slices would be a sum of as many whole tensors.
    """
    flat = [1, -1, *queries.shape[2:]]  # [1, B * L, H, E]
    parts = (states.reshape(flat).split(list(bias.lengths), axis=1) for states in (queries, keys, values))
    merged = [
        _attend_all(query, key, value, bias.biases[length])
        for length, query, key, value in zip(bias.lengths, *parts, strict=True)
    ]
    return paddle.concat(merged, axis=1)


def _attend_all(
    queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor, bias: paddle.Tensor | None
) -> paddle.Tensor:
    """Every query with every key that the bias may show it; [B, L, H, E] and twice [B, S, H, E] -> [B, L, H, E]."""
    causal = bias is not None and bias.ndim == 2
    block = _CAUSAL_BLOCK if causal and paddle.get_device() == "cpu" else None
    return AttentionFunction.apply(queries, keys, values, bias, block)
