"""Attention over heads: which keys a query sees, and the product itself.

A mask is made once for all layers, in the form that is fast here; `attention_mask` says when which.  How a product is
computed on a device is the business of `kernels/formulas.py`.
Shapes: B batch, L query positions, S key positions, H query heads, K key/value heads, E head width.
Source: Vaswani et al. 2017, "Attention Is All You Need".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import paddle

from paddlemix.models.kernels import formulas
from paddlemix.models.kernels.cached_constants import cached_range

MASKED = -1e9  # added to a score that must not count; finite, so that a fully masked row stays finite


@dataclass(frozen=True)
class SegmentLengths:
    """The samples of packed rows, known to the host: the batch's flat positions [B * L], cut into runs.

    Args:
        lengths: positions of each run, >= 1, adding up to B * L.  A row's padding is a run like a sample; no run
            crosses the end of a row.
    """

    lengths: tuple[int, ...]


Segments: TypeAlias = "paddle.Tensor | SegmentLengths"  # what a model accepts as `segment_ids`


class AttentionMask(ABC):
    """Which keys each query sees."""

    @abstractmethod
    def attend(self, queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor) -> paddle.Tensor:
        """Softmax attention under this mask, of tensors of one type.

        Args:
            queries: [B, L, H, E]; keys, values: [B, S, K, E] with H a multiple of K.

        Returns:
            [B, L, H, E], or the same numbers as [1, B * L, H, E] or [B * L, H, E].
        """

    @property
    def is_causal_matrix(self) -> bool:
        """Whether this is one matrix [L, S] for all rows, so that `after` can leave out leading queries."""
        return False

    def after(self, position: int) -> AttentionMask:
        """The mask of the queries from a position on; of a causal matrix."""
        raise TypeError(f"{type(self).__name__} is not a causal matrix")


@dataclass(frozen=True)
class DenseMask(AttentionMask):
    """A matrix that is added to the scores.

    Args:
        bias: float32 [L, S] or [B, 1, L, S], see `attention_bias`; None where every query sees every key.
    """

    bias: paddle.Tensor | None = None

    def attend(self, queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor) -> paddle.Tensor:
        if self.bias is None:
            return formulas.full_attention(queries, keys, values)
        return formulas.masked_attention(queries, keys, values, self.bias)

    @property
    def is_causal_matrix(self) -> bool:
        return self.bias is not None and self.bias.ndim == 2

    def after(self, position: int) -> DenseMask:
        assert self.bias is not None
        return DenseMask(self.bias[position:])


@dataclass(frozen=True)
class SegmentedMask(AttentionMask):
    """Packed rows, each run of the flat positions on its own: scores between samples are never computed.

    Args:
        lengths: see `SegmentLengths`.
        biases: length of a run -> `attention_bias` of a sample of that length alone.
    """

    lengths: tuple[int, ...]
    biases: dict[int, paddle.Tensor | None]

    def attend(self, queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor) -> paddle.Tensor:
        whole = (states.reshape([1, -1, *states.shape[2:]]) for states in (queries, keys, values))  # [1, B * L, .., E]
        # A split's gradient is one concatenation; that of slices would be a sum of as many whole tensors.
        parts = (states.split(list(self.lengths), axis=1) for states in whole)
        merged = [
            formulas.masked_attention(query, key, value, self.biases[length])
            for length, query, key, value in zip(self.lengths, *parts, strict=True)
        ]
        return paddle.concat(merged, axis=1)


@dataclass(frozen=True)
class CausalMask(AttentionMask):
    """Causal rows, or runs of packed rows, for a kernel that knows causality itself and needs no matrix.

    Args:
        length: L, of queries and of keys.
        segments: the runs; None where every row is one.
        starts: int32 [n + 1], first flat position of each run, and their end; None without runs.
    """

    length: int
    segments: SegmentLengths | None
    starts: paddle.Tensor | None

    def attend(self, queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor) -> paddle.Tensor:
        if not formulas.supports_causal_attention(queries, keys, values):
            return self.as_matrices().attend(queries, keys, values)
        if self.segments is None:
            return formulas.causal_attention(queries, keys, values)
        assert self.starts is not None
        queries, keys, values = (
            part.reshape([-1, *part.shape[2:]]) for part in (queries, keys, values)
        )  # [B * L, .., E]
        return formulas.packed_causal_attention(queries, keys, values, self.starts, max(self.segments.lengths))

    def as_matrices(self) -> AttentionMask:
        """The same as matrices, for tensors that the kernel does not support."""
        if self.segments is not None:
            return _segmented(self.segments, None)
        return DenseMask(attention_bias(self.length, self.length, None, None))


EVERY_KEY = DenseMask()


def attention_mask(
    query_length: int,
    key_length: int,
    query_segments: Segments | None,
    key_segments: Segments | None,
    window: int | None = None,
) -> AttentionMask:
    """The mask of a batch, in the form that all layers compute with.

    Args:
        query_segments, key_segments: int64 [B, L] and [B, S], or twice the same `SegmentLengths`, of rows without a
            cache; a query sees only keys of its own segment.  None where every row is one sample that begins at
            position 0.
        window: positions that a query sees, its own included; None for all before it.

    Raises:
        ValueError: only one of the two is `SegmentLengths`, or they differ.
    """
    # rows                                      a kernel without a matrix      form
    # packed, their lengths known to the host   has runs, no shorter window    CausalMask
    # packed, their lengths known to the host   else                           SegmentedMask
    # one sample each, no cache                 has rows, no shorter window    CausalMask
    # any others                                -                              DenseMask
    if isinstance(query_segments, SegmentLengths) or isinstance(key_segments, SegmentLengths):
        if not isinstance(query_segments, SegmentLengths) or query_segments is not key_segments:
            raise ValueError("SegmentLengths are of whole rows without a cache; give segment ids as a tensor")
        return _causal(query_length, query_segments, window) or _segmented(query_segments, window)
    if query_length == key_length and query_segments is None and key_segments is None:
        causal = _causal(query_length, None, window)
        if causal is not None:
            return causal
    return DenseMask(attention_bias(query_length, key_length, query_segments, key_segments, window))


def _causal(length: int, segments: SegmentLengths | None, window: int | None) -> CausalMask | None:
    """Rows for a kernel without a mask; None where this run has none, or a window hides more than causality does."""
    longest = length if segments is None else max(segments.lengths)
    if not formulas.has_causal_attention(packed=segments is not None):
        return None
    if (window is not None and window < longest) or (segments is None and length == 1):
        return None
    # made here and not per layer, because it is a copy from the host
    starts = None if segments is None else paddle.to_tensor(np.cumsum((0, *segments.lengths)), dtype="int32")
    return CausalMask(length, segments, starts)


def _segmented(segments: SegmentLengths, window: int | None) -> SegmentedMask:
    """One matrix for each length among the runs."""
    # runs of equal length share a matrix
    biases = {length: attention_bias(length, length, None, None, window) for length in set(segments.lengths)}
    return SegmentedMask(segments.lengths, biases)


def attention_bias(
    query_length: int,
    key_length: int,
    query_segments: paddle.Tensor | None,
    key_segments: paddle.Tensor | None,
    window: int | None = None,
) -> paddle.Tensor | None:
    """What is added to the scores: 0 where a query sees a key, else `MASKED`.

    Args:
        query_segments, key_segments, window: see `attention_mask`.

    Returns:
        float32 [L, S] or [B, 1, L, S] (`MASKED` is infinite in float16); None when nothing is masked.  On CPU a matrix
        is added ten times faster than the same with leading axes of 1.
    """
    allowed = None
    limited = window is not None and window < key_length
    if query_length > 1 or limited:
        # Queries are the last of the keys: the cache holds those before.
        queries = cached_range(key_length - query_length, key_length).unsqueeze(-1)
        keys = cached_range(key_length).unsqueeze(0)
        allowed = keys <= queries  # [L, S]
        if limited:
            allowed = paddle.logical_and(allowed, keys > queries - window)
    if query_segments is not None and key_segments is not None:
        same = (query_segments.unsqueeze(-1) == key_segments.unsqueeze(-2)).unsqueeze(1)  # [B, 1, L, S]
        allowed = same if allowed is None else paddle.logical_and(allowed, same)
    if allowed is None:
        return None
    return (1.0 - allowed.astype("float32")) * MASKED


def packed_segments(segment_ids: np.ndarray) -> SegmentLengths | np.ndarray | None:
    """What the decoder accepts as `segment_ids` for the rows of a training batch, in the form that is fast here.

    Args:
        segment_ids: int64 [B, L], see `paddlemix.sample.Batch`; padding is on the right.

    Returns:
        None where every row is one sample, because nothing sees the padding after it; for packed rows `SegmentLengths`
        where samples are computed one by one, else the ids themselves, to be a tensor [B, L] there.
    """
    if segment_ids.max(initial=0) <= 1:
        return None
    if not formulas.prefers_segment_lengths():
        return segment_ids
    # A run begins at the start of every row, so that no run crosses into the next, and where the number changes.
    first = np.ones(segment_ids.shape, dtype=bool)
    first[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = np.flatnonzero(first)
    return SegmentLengths(tuple(np.diff(starts, append=segment_ids.size).tolist()))


def attend(
    queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor, mask: AttentionMask = EVERY_KEY
) -> paddle.Tensor:
    """softmax(q k^T / sqrt(E)) v over the keys that the mask shows.

    Args:
        queries: [B, L, H, E]; keys, values: [B, S, K, E] with H a multiple of K.

    Returns:
        [B, L, H * E].
    """
    batch, length, heads, head_size = queries.shape
    queries, keys, values = formulas.in_one_type(queries, keys, values)
    with formulas.without_autocast():
        merged = mask.attend(queries, keys, values)
    return merged.reshape([batch, length, heads * head_size])
