"""The decoder over the few tokens after a cache, in as few operators as possible.

For one token a CPU spends its time in calls, not in products.  So this file computes what `decoder.py` does without
gradients and reshapes, with whatever all layers share made once; tests hold the two equal.

    when                                                which
    weights, cache and tokens are float32 on the CPU,   `_CompiledStep`: attention over the cache, each norm and each
    and the kernels in C are built                      gate is one call of C
    otherwise                                           `_Step`: paddle's operators, or fused ones where a run has them

Shapes: B rows, L new tokens, H query heads, K key/value heads, E head width, R room of the cache, D width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional

from paddlemix.models.attention import MASKED
from paddlemix.models.decoder import Decoder, DecoderLayer
from paddlemix.models.device_tables import FIRST_POSITIONS, DeviceTables
from paddlemix.models.kernels import cpu, cpu_library
from paddlemix.models.kernels.formulas import product
from paddlemix.models.kernels.fused import is_supported, is_supported_type, selected_kernels
from paddlemix.models.kernels.operators import on_cpu
from paddlemix.models.kv_cache import KVCache
from paddlemix.models.layers import RMSNorm, after_hooks
from paddlemix.models.rotary import Rope, rotary_tables

_Table = tuple[paddle.Tensor, paddle.Tensor]
_Angles = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class _CompiledStep:
    """What all layers need for these tokens where the kernels in C compute.

    Args:
        normed: [B * L, D], reused for the output of every norm.
    """

    cache: KVCache
    tokens: cpu.CachedTokens
    normed: paddle.Tensor


@dataclass(frozen=True)
class _Step:
    """What all layers need for these tokens where paddle's operators compute.

    Args:
        shape: (B, L).
        query_table, key_table: cosines and sines, [B, L, H, E] and [B, L, K, E] on CPU, [B, L, 1, E] elsewhere; those
            of queries hold 1 / sqrt(E).
        half_turn: [E, E], see `rotary_tables`.
        bias: float32, added to scores [B, K, H / K * L, R]; hides padding, the future and what is not written.
    """

    cache: KVCache
    shape: tuple[int, int]
    query_table: _Table
    key_table: _Table
    half_turn: paddle.Tensor
    bias: paddle.Tensor


class CachedDecoder:
    """A decoder over the tokens after a cache, without gradients.

    Args:
        decoder: its weights are used as they are at each call; its layers may be adapted or quantised.
    """

    def __init__(self, decoder: Decoder) -> None:
        config = decoder.config
        self._heads, self._key_value_heads = config.num_attention_heads, config.key_value_heads
        self._head_size, self._rope, self._window = config.head_size, config.rope, config.sliding_window
        self._layers = [_CachedLayer(number, layer) for number, layer in enumerate(decoder.layers)]
        self._norm = _norm(decoder.norm)
        self._norm_weights = [
            norm.weight for layer in decoder.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        self._kept: tuple[_Angles, paddle.Tensor] | None = None
        self._on_device = DeviceTables(self._rope, 1.0 / math.sqrt(self._head_size), self._window)

    @paddle.no_grad()
    def __call__(self, embeds: paddle.Tensor, position_ids: np.ndarray, cache: KVCache) -> paddle.Tensor:
        """Runs all layers; the tokens are added to the cache.

        Args:
            embeds: [B, L, D].
            position_ids: int64 [B, L]; a row whose first is p has the cache's last p positions and padding before.
            cache: holds at least one position.

        Returns:
            Hidden state of each row's last token after the final norm, [B, D].
        """
        batch, length, width = embeds.shape
        cache.reserve(cache.length + length)
        hidden = embeds.reshape([batch * length, width])
        if cpu_library.is_supported(hidden, *self._norm_weights) and cache.dtype == paddle.float32:
            fast = self._compiled_step(hidden, position_ids, cache)
            for layer in self._layers:
                hidden = layer.run_compiled(hidden, fast)
        else:
            step = self._step(position_ids, cache, embeds)
            for layer in self._layers:
                hidden = layer(hidden, step)
        if length > 1:
            hidden = hidden.reshape([batch, length, width])[:, -1]  # only the last token's scores are asked for
        return self._norm(hidden)

    # Angles and masks depend on positions alone, so they are made once per token and shared by all layers.

    def _compiled_step(self, states: paddle.Tensor, position_ids: np.ndarray, cache: KVCache) -> _CompiledStep:
        angles, _ = self._tables(position_ids, paddle.float32)
        cosines, sines = (paddle.to_tensor(part) for part in angles)
        hidden = paddle.to_tensor(cache.length - position_ids[:, 0])
        heads = self._heads, self._key_value_heads
        tokens = cpu.CachedTokens(heads, (cosines, sines), hidden, cache.room, cache.length, self._window)
        return _CompiledStep(cache=cache, tokens=tokens, normed=paddle.empty_like(states))

    def _step(self, position_ids: np.ndarray, cache: KVCache, embeds: paddle.Tensor) -> _Step:
        batch, length = position_ids.shape
        groups, dtype = self._heads // self._key_value_heads, embeds.dtype
        if on_cpu(embeds):
            angles, half_turn = self._tables(position_ids, dtype)
            fused = selected_kernels().rotary is not None and is_supported_type(dtype)
            queries = _spread(angles, 1 if fused else self._heads, 1.0 / math.sqrt(self._head_size), dtype)
            keys = _spread(angles, 1 if fused else self._key_value_heads, 1.0, dtype)
            bias = paddle.to_tensor(_hidden(position_ids, cache.length, cache.room, groups, self._window))
        else:
            first = position_ids[:, 0]
            queries, keys, half_turn = self._on_device.angles(first, length, dtype)
            bias = self._on_device.bias(cache.length - first, cache.length, length, cache.room, groups)
        return _Step(cache, (batch, length), queries, keys, half_turn, bias)

    def _tables(self, position_ids: np.ndarray, dtype: paddle.dtype) -> tuple[_Angles, paddle.Tensor]:
        """Cosines and sines, float32 [B, L, 1, E], and the half turn.  Those of the first positions are made once."""
        count = int(position_ids.max()) + 1
        if self._rope.dynamic and count > self._rope.context:
            # Frequencies depend on the length here, so that no table can be kept.
            return _angles(paddle.to_tensor(position_ids), self._rope, dtype)
        if self._kept is None or len(self._kept[0][0]) < count:
            # Doubled each time, so that an answer of n tokens makes log(n) tables.
            size = max(count, FIRST_POSITIONS if self._kept is None else 2 * len(self._kept[0][0]))
            size = min(size, self._rope.context) if self._rope.dynamic else size
            (cosines, sines), half_turn = _angles(paddle.arange(size).unsqueeze(0), self._rope, dtype)
            self._kept = (cosines[0], sines[0]), half_turn
        (cosines, sines), half_turn = self._kept
        return (cosines[position_ids], sines[position_ids]), half_turn


class _CachedLayer:
    """One layer; hidden states are [B * L, D]."""

    def __init__(self, number: int, layer: DecoderLayer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._number, self._width = number, attention.head_size
        self._heads, self._key_value_heads = attention.heads, attention.key_value_heads
        self._queries, self._keys = _linear(attention.q_proj), _linear(attention.k_proj)
        self._values, self._output = _linear(attention.v_proj), _last(attention, attention.o_proj)
        self._gate, self._up, self._down = _linear(mlp.gate_proj), _linear(mlp.up_proj), _last(mlp, mlp.down_proj)
        self._norms = layer.input_layernorm, layer.post_attention_layernorm
        self._first_norm, self._second_norm = map(_norm, self._norms)

    def __call__(self, hidden: paddle.Tensor, step: _Step) -> paddle.Tensor:
        """[B * L, D] -> [B * L, D]."""
        hidden = hidden + self._output(self._attend(self._first_norm(hidden), step))
        normed = self._second_norm(hidden)
        return hidden + self._down(_gated(self._gate(normed), self._up(normed)))

    def run_compiled(self, hidden: paddle.Tensor, step: _CompiledStep) -> paddle.Tensor:
        """As a call."""
        # Norms, attention and gates are written into tensors that exist already.
        normed = _normalise_into(step.normed, self._norms[0], hidden)
        queries, keys, values = self._queries(normed), self._keys(normed), self._values(normed)
        merged = cpu.attend_cached_(step.tokens, queries, keys, values, step.cache.buffers(self._number))
        step.cache.advance(self._number, step.tokens.count)
        hidden = hidden + self._output(merged)
        normed = _normalise_into(step.normed, self._norms[1], hidden)
        return hidden + self._down(cpu.gated_(self._gate(normed), self._up(normed)))

    def _attend(self, normed: paddle.Tensor, step: _Step) -> paddle.Tensor:
        """[B * L, D] -> [B * L, H * E]."""
        (batch, length), width = step.shape, self._width
        heads, groups = self._key_value_heads, self._heads // self._key_value_heads
        wide, narrow = [batch, length, self._heads, width], [batch, length, heads, width]
        queries = _rotate(self._queries(normed).reshape(wide), step.query_table, step.half_turn)
        keys = _rotate(self._keys(normed).reshape(narrow), step.key_table, step.half_turn)
        values = self._values(normed).reshape(narrow)
        if length > 1:  # [B, L, heads, E] -> [B, heads, L, E]; for one token these are the same numbers in order
            queries, keys, values = (part.transpose([0, 2, 1, 3]) for part in (queries, keys, values))
        held = step.cache.write(self._number, *(part.reshape([batch, heads, length, width]) for part in (keys, values)))
        queries = queries.reshape([batch, heads, groups * length, width])
        # Queries already hold 1 / sqrt(E); the query heads of a key head are rows of one matrix.
        scores = paddle.matmul(queries, held[0], transpose_y=True)  # [B, K, H / K * L, R]
        if scores.dtype != paddle.float32:
            scores = scores.astype("float32")
        weights = functional.softmax(scores + step.bias, axis=-1)
        merged = paddle.matmul(weights if weights.dtype == held[1].dtype else weights.astype(held[1].dtype), held[1])
        if length > 1:  # [B, K, H / K * L, E] -> [B, L, H, E]
            merged = merged.reshape([batch, self._heads, length, width]).transpose([0, 2, 1, 3])
        return merged.reshape([batch * length, self._heads * width])


def _linear(layer: nn.Layer) -> Callable[[paddle.Tensor], paddle.Tensor]:
    """A layer over [n, in]; a plain one as its product alone, since a call of a layer costs as much as a small one."""
    # The weight is bound here, so a layer must not be replaced afterwards; its numbers may change in place.
    if type(layer) is nn.Linear and layer.bias is None:
        return functools.partial(product, weight=layer.weight)
    return layer


def _last(block: nn.Layer, layer: nn.Layer) -> Callable[[paddle.Tensor], paddle.Tensor]:
    """The last layer of a block, over [n, in], and the block's forward hooks on what it returns."""
    last = _linear(layer)
    return last if not block._forward_post_hooks else lambda inputs: after_hooks(block, inputs, last(inputs))


def _normalise_into(outputs: paddle.Tensor, norm: RMSNorm, hidden: paddle.Tensor) -> paddle.Tensor:
    return cpu.rms_norm_into(outputs, hidden, norm.weight, norm.epsilon)


def _norm(norm: RMSNorm) -> Callable[[paddle.Tensor], paddle.Tensor]:
    return functools.partial(_normalise, norm.weight, norm.epsilon, {})


def _normalise(weight: paddle.Tensor, epsilon: float, kept: dict[str, Any], hidden: paddle.Tensor) -> paddle.Tensor:
    """RMS norm of [n, D], in float32; on CPU means are products with ones that are made once."""
    kernel = selected_kernels().rms_norm
    if kernel is not None and is_supported(hidden, weight):
        return kernel(hidden, weight, epsilon)
    wide = hidden if hidden.dtype == paddle.float32 else hidden.astype("float32")
    if on_cpu(hidden):
        if "ones" not in kept:
            kept["ones"] = paddle.full([hidden.shape[1], 1], 1.0 / hidden.shape[1], dtype="float32")
        means = paddle.matmul(wide * wide, kept["ones"])
    else:
        means = (wide * wide).mean(axis=-1, keepdim=True)
    scaled = wide * paddle.rsqrt(means + epsilon)
    return (scaled if hidden.dtype == paddle.float32 else scaled.astype(hidden.dtype)) * weight


def _gated(gate: paddle.Tensor, up: paddle.Tensor) -> paddle.Tensor:
    kernel = selected_kernels().swiglu
    return kernel(gate, up) if kernel is not None and is_supported(gate, up) else functional.silu(gate) * up


def _rotate(states: paddle.Tensor, table: _Table, half_turn: paddle.Tensor) -> paddle.Tensor:
    kernel = selected_kernels().rotary
    if kernel is not None and is_supported(states, table[0]):
        return kernel(states, *table)
    return states * table[0] + paddle.matmul(states, half_turn) * table[1]


def _angles(position_ids: paddle.Tensor, rope: Rope, dtype: paddle.dtype) -> tuple[_Angles, paddle.Tensor]:
    """Cosines and sines of [B, L] positions, float32 [B, L, 1, E], and the half turn."""
    cosines, sines, half_turn = rotary_tables(position_ids, 1, rope, paddle.float32)
    return (cosines.numpy(), sines.numpy()), half_turn.astype(dtype)


def _spread(angles: _Angles, heads: int, scale: float, dtype: paddle.dtype) -> _Table:
    """[B, L, 1, E] twice -> [B, L, heads, E] twice, of `dtype`."""
    first, second = (paddle.to_tensor(np.tile(part * np.float32(scale), (1, 1, heads, 1))) for part in angles)
    return (first, second) if dtype == paddle.float32 else (first.astype(dtype), second.astype(dtype))


def _hidden(position_ids: np.ndarray, held: int, room: int, groups: int, window: int | None) -> np.ndarray:
    """`MASKED` at what a token does not see: float32 [R], [groups * L, R] for one row, or [B, 1, groups * L, R].  On
    CPU a matrix is added several times faster than the same with leading axes of 1."""
    places = np.arange(room)
    length = position_ids.shape[1]
    # Token i of these is written at place held + i and sees the places up to its own.
    last = held + np.arange(length)[None, :, None]  # [1, L, 1]: each token's own place
    hidden = places > last
    if window is not None:
        hidden = hidden | (places <= last - window)
    padding = held - position_ids[:, 0]
    if padding.any():
        hidden = hidden | (places < padding[:, None, None])
    bias = np.where(hidden, np.float32(MASKED), np.float32(0))  # [1 or B, L, R]
    if bias.shape[:2] == (1, 1):
        return bias[0, 0]
    if len(bias) == 1:
        return np.tile(bias[0], (groups, 1))
    return np.tile(bias[:, None], (1, 1, groups, 1))
