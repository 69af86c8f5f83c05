"""Attention over heads: masks, rotary positions and the product itself.

Rows that hold several samples are computed sample by sample on CPU, by a kernel that takes lengths where `fused.py` has
one, and with a mask elsewhere; `packed_segments` and `attention_bias` are where that is chosen.
Shapes: B batch, L query positions, S key positions, H query heads, K key/value heads, E head width.
Source: Vaswani et al. 2017; rotary positions as in transformers' Llama (halves, not pairs).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import paddle

from paddlemix.models.kernels import cpu
from paddlemix.models.kernels.attention_functions import AttentionFunction
from paddlemix.models.kernels.cached_constants import cached_range
from paddlemix.models.kernels.functions import as_type, autocasts, product_type
from paddlemix.models.kernels.fused import is_supported, selected_kernels
from paddlemix.models.kernels.operators import repeat_heads

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


@dataclass(frozen=True)
class CausalRuns:
    """Causal rows, or runs of packed rows, for a fused kernel, which needs no mask.

    Args:
        length: L, of queries and of keys.
        segments: the runs; None where every row is one.
        starts: int32 [n + 1], first flat position of each run and their end; None without runs.
    """

    length: int
    segments: SegmentLengths | None
    starts: paddle.Tensor | None

    def plain(self) -> Bias:
        """The masks, for tensors that no fused kernel takes."""
        return attention_bias(self.length, self.length, self.segments, self.segments, fused=False)


Segments: TypeAlias = "paddle.Tensor | SegmentLengths"  # what a model takes as `segment_ids`
Bias: TypeAlias = "paddle.Tensor | SegmentBiases | CausalRuns | None"


def packed_segments(segment_ids: np.ndarray) -> SegmentLengths | np.ndarray | None:
    """What the decoder takes as `segment_ids` for the rows of a training batch, in the form that is fast here.

    Args:
        segment_ids: int64 [B, L], see `paddlemix.sample.Batch`; padding stands on the right.

    Returns:
        None where every row is one sample, because padding behind it is never seen; for packed rows `SegmentLengths` on
        CPU, where scores that a mask throws away cost as much as those that count, and for a fused kernel, which takes
        lengths; else the ids themselves, to be a tensor [B, L] there, because other devices want few large products.
    """
    if segment_ids.max(initial=0) <= 1:
        return None
    if paddle.get_device() != "cpu" and selected_kernels().packed_attention is None:
        return segment_ids
    first = np.ones(segment_ids.shape, dtype=bool)
    first[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = np.flatnonzero(first)
    return SegmentLengths(tuple(np.diff(starts, append=segment_ids.size).tolist()))


def attention_bias(
    query_length: int,
    key_length: int,
    query_segments: Segments | None,
    key_segments: Segments | None,
    window: int | None = None,
    fused: bool = True,
) -> Bias:
    """What is added to the scores: 0 where a query may look, else `MASKED`.

    Args:
        query_segments, key_segments: int64 [B, L] and [B, S], or twice the same `SegmentLengths`, of rows without a
            cache; a query sees only keys of its own segment. None where every row is one sample that begins at
            position 0.
        window: positions that a query sees, its own included; None for all before it.
        fused: give no mask where a fused kernel of the run takes whole rows or runs without one.

    Returns:
        `CausalRuns` for such a kernel.  Else float32 [L, S] or [B, 1, L, S] (`MASKED` is infinite in float16), or None
        when nothing is masked; for `SegmentLengths` one [n, n] for every n among the lengths.  On CPU a matrix is added
        ten times faster than the same with leading axes of 1.

    Raises:
        ValueError: only one of the two is `SegmentLengths`, or they differ.
    """
    if isinstance(query_segments, SegmentLengths) or isinstance(key_segments, SegmentLengths):
        if not isinstance(query_segments, SegmentLengths) or query_segments is not key_segments:
            raise ValueError("SegmentLengths are of whole rows without a cache; give segment ids as a tensor")
        lengths = query_segments.lengths
        runs = _causal_runs(query_length, query_segments, window) if fused else None
        if runs is not None:
            return runs
        biases = {length: attention_bias(length, length, None, None, window, False) for length in set(lengths)}
        return SegmentBiases(lengths, biases)
    if fused and query_length == key_length and query_segments is None and key_segments is None:
        runs = _causal_runs(query_length, None, window)
        if runs is not None:
            return runs
    allowed = None
    behind = window is not None and window < key_length
    if query_length > 1 or behind:
        queries = cached_range(key_length - query_length, key_length).unsqueeze(-1)
        keys = cached_range(key_length).unsqueeze(0)
        allowed = keys <= queries  # [L, S]
        if behind:
            allowed = paddle.logical_and(allowed, keys > queries - window)
    if query_segments is not None and key_segments is not None:
        same = (query_segments.unsqueeze(-1) == key_segments.unsqueeze(-2)).unsqueeze(1)  # [B, 1, L, S]
        allowed = same if allowed is None else paddle.logical_and(allowed, same)
    if allowed is None:
        return None
    return (1.0 - allowed.astype("float32")) * MASKED


def _causal_runs(length: int, segments: SegmentLengths | None, window: int | None) -> CausalRuns | None:
    """Rows for a fused kernel; None where this run has none for them, or a window hides more than causality does."""
    kernel = selected_kernels().attention if segments is None else selected_kernels().packed_attention
    longest = length if segments is None else max(segments.lengths)
    if kernel is None or (window is not None and window < longest) or (segments is None and length == 1):
        return None
    starts = None if segments is None else paddle.to_tensor(np.cumsum((0, *segments.lengths)), dtype="int32")
    return CausalRuns(length, segments, starts)


def attend(queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor, bias: Bias) -> paddle.Tensor:
    """Softmax attention.

    Args:
        queries: [B, L, H, E]; keys, values: [B, S, K, E] with H a multiple of K.
        bias: see `attention_bias`.

    Returns:
        [B, L, H * E].
    """
    batch, length, heads, head_size = queries.shape
    # Under autocast what was added to or turned comes in float32; the backward pass, outside autocast, needs one type.
    dtype = product_type(values)
    queries, keys, values = (as_type(states, dtype) for states in (queries, keys, values))
    with paddle.amp.auto_cast(enable=False) if autocasts() else contextlib.nullcontext():
        merged = _merge(queries, keys, values, bias)
    return merged.reshape([batch, length, heads * head_size])


def _merge(queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor, bias: Bias) -> paddle.Tensor:
    """As `attend`, of tensors of one type; [B, L, H, E] or [B * L, H, E]."""
    if isinstance(bias, CausalRuns) or (bias is None and selected_kernels().attention is not None):
        merged = _attend_fused(queries, keys, values, bias)
        if merged is not None:
            return merged
        bias = bias.plain() if bias is not None else None
    if isinstance(bias, SegmentBiases):
        return _attend_by_segment(queries, keys, values, bias)
    return _attend_all(queries, keys, values, bias)


def _attend_fused(
    queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor, bias: CausalRuns | None
) -> paddle.Tensor | None:
    """As `attend`, [B, L, H, E] or [B * L, H, E]; None where the precision is none that a fused kernel takes."""
    if not is_supported(queries, keys, values):
        return None
    kernels = selected_kernels()
    if bias is not None and bias.segments is not None:
        assert kernels.packed_attention is not None
        flat = (part.reshape([-1, *part.shape[2:]]) for part in (queries, keys, values))
        return kernels.packed_attention(*flat, bias.starts, max(bias.segments.lengths))
    assert kernels.attention is not None
    return kernels.attention(queries, keys, values, bias is not None)


def _attend_by_segment(
    queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor, bias: SegmentBiases
) -> paddle.Tensor:
    """Each run of the flat positions on its own; [B, L, H, E] and twice [B, L, K, E] -> [1, B * L, H, E].

    A split's gradient is one concatenation; that of slices would be a sum of as many whole tensors.
    """
    flat = (states.reshape([1, -1, *states.shape[2:]]) for states in (queries, keys, values))  # [1, B * L, H or K, E]
    parts = (states.split(list(bias.lengths), axis=1) for states in flat)
    merged = [
        _attend_all(query, key, value, bias.biases[length])
        for length, query, key, value in zip(bias.lengths, *parts, strict=True)
    ]
    return paddle.concat(merged, axis=1)


def _attend_all(
    queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor, bias: paddle.Tensor | None
) -> paddle.Tensor:
    """Every query with every key that the bias may show it; [B, L, H, E] and twice [B, S, K, E] -> [B, L, H, E]."""
    groups = queries.shape[2] // keys.shape[2]
    if groups > 1 and not cpu.supports_attention(queries, keys, values, bias):
        keys, values = (repeat_heads(states, groups) for states in (keys, values))
    causal = bias is not None and bias.ndim == 2
    block = _CAUSAL_BLOCK if causal and paddle.get_device() == "cpu" else None
    return AttentionFunction.apply(queries, keys, values, bias, block)
