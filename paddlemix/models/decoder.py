"""The language model: a Llama-style decoder from embeddings to hidden states.

Knows no image, no token but its own and no family: these differ in what `DecoderConfig` says.  Logits are taken from
the hidden states by the caller.
Source: Touvron et al. 2023, "LLaMA"; numbers checked against transformers' LlamaModel, MistralModel and Qwen2Model.
"""

from __future__ import annotations

import paddle
from paddle import nn
from paddle.distributed.fleet.utils import recompute

from paddlemix.models.attention import Bias, attend, attention_bias
from paddlemix.models.configuration import DecoderConfig
from paddlemix.models.kernels.operators import take_rows
from paddlemix.models.kv_cache import KVCache
from paddlemix.models.layers import RMSNorm, apply_linear, linear, normal
from paddlemix.models.linear_groups import gated_linear, normed_linears
from paddlemix.models.rotary import RotaryTables, rotary_tables, rotate


class DecoderAttention(nn.Layer):
    """Causal self-attention with rotary positions and grouped key/value heads."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_size = layer, config.head_size
        self.heads, self.key_value_heads = config.num_attention_heads, config.key_value_heads
        width, std, bias = config.hidden_size, config.initializer_range, config.attention_bias
        self.q_proj = linear(width, self.heads * self.head_size, std, bias)
        self.k_proj = linear(width, self.key_value_heads * self.head_size, std, bias)
        self.v_proj = linear(width, self.key_value_heads * self.head_size, std, bias)
        self.o_proj = linear(self.heads * self.head_size, width, std, config.output_bias)

    def forward(
        self,
        norm: RMSNorm,
        hidden: paddle.Tensor,
        tables: tuple[RotaryTables, RotaryTables],
        bias: Bias,
        cache: KVCache | None,
        chosen: paddle.Tensor | None = None,
    ) -> paddle.Tensor:
        """[B, L, D], which the norm is applied to -> [B, L, D], or [S, D] of the S chosen flat positions."""
        batch, length, _ = hidden.shape
        first, chosen = _first_chosen(chosen, length, bias, cache)
        if first:
            asked = hidden[:, first:].contiguous()  # recomputation loses a view's strides
            queries = self.q_proj(norm(asked))
            keys, values = normed_linears(norm, [self.k_proj, self.v_proj], hidden)
        else:
            queries, keys, values = normed_linears(norm, [self.q_proj, self.k_proj, self.v_proj], hidden)
        queries = queries.reshape([batch, length - first, self.heads, self.head_size])
        keys, values = (part.reshape([batch, length, self.key_value_heads, self.head_size]) for part in (keys, values))
        if first and isinstance(bias, paddle.Tensor):
            bias, tables = bias[first:], (_behind(tables[0], first), tables[1])
        queries, keys = rotate(queries, tables[0]), rotate(keys, tables[1])
        if cache is not None:
            keys, values = cache.append(self.layer, keys, values)
        return apply_linear(self.o_proj, _choose(attend(queries, keys, values, bias), chosen))


class DecoderMLP(nn.Layer):
    """Gated feed-forward part: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, inner, std = config.hidden_size, config.intermediate_size, config.initializer_range
        self.gate_proj = linear(width, inner, std)
        self.up_proj = linear(width, inner, std)
        self.down_proj = linear(inner, width, std)

    def forward(self, norm: RMSNorm, hidden: paddle.Tensor) -> paddle.Tensor:
        """[..., D], which the norm is applied to -> [..., D]."""
        gate, up = normed_linears(norm, [self.gate_proj, self.up_proj], hidden)
        return gated_linear(self.down_proj, gate, up)


class DecoderLayer(nn.Layer):
    """Attention and feed-forward part, each behind a norm and added to its input."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DecoderAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = DecoderMLP(config)

    def forward(
        self,
        hidden: paddle.Tensor,
        tables: tuple[RotaryTables, RotaryTables],
        bias: Bias,
        cache: KVCache | None,
        chosen: paddle.Tensor | None = None,
    ) -> paddle.Tensor:
        """[B, L, D] -> [B, L, D], or [S, D] of the S chosen flat positions."""
        hidden = _choose(hidden, chosen) + self.self_attn(self.input_layernorm, hidden, tables, bias, cache, chosen)
        return hidden + self.mlp(self.post_attention_layernorm, hidden)


class Decoder(nn.Layer):
    """Embedding, layers and final norm.

    Args:
        config: sizes.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(
            config.vocab_size,
            config.hidden_size,
            weight_attr=paddle.ParamAttr(initializer=normal(config.initializer_range)),
        )
        self.layers = nn.LayerList([DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.enable_recompute = False

    def forward(
        self,
        embeds: paddle.Tensor,
        position_ids: paddle.Tensor,
        segment_ids: paddle.Tensor | None = None,
        cache: KVCache | None = None,
        chosen: paddle.Tensor | None = None,
    ) -> paddle.Tensor:
        """Runs all layers.

        Args:
            embeds: [B, L, D].
            position_ids: int64 [B, L], of these tokens.
            segment_ids: int64 [B, L] where rows are packed or padded on the left; None for rows of one sample each that
                begin at position 0.
            cache: positions seen before; these tokens are added to it.
            chosen: int64 [S], the flat positions that are asked for; None for all.  The others leave the last layer
                once their keys and values are computed.

        Returns:
            Hidden states after the final norm, [B, L, D], or [S, D] where positions are chosen.
        """
        length, seen = embeds.shape[1], cache.length if cache is not None else 0
        segments = _segments(segment_ids, embeds.shape[:2], cache)
        bias = attention_bias(length, seen + length, *segments, self.config.sliding_window)
        tables = self._tables(position_ids, embeds.dtype)
        hidden = embeds
        for number, layer in enumerate(self.layers, start=1):
            wanted = chosen if number == len(self.layers) else None
            if self.enable_recompute and self.training and cache is None:
                # the reentrant form gives no gradient at all where the embeddings are frozen, as with LoRA
                hidden = recompute(layer, hidden, tables, bias, None, wanted, use_reentrant=False)
            else:
                hidden = layer(hidden, tables, bias, cache, wanted)
        return self.norm(hidden)

    def _tables(self, position_ids: paddle.Tensor, dtype: paddle.dtype) -> tuple[RotaryTables, RotaryTables]:
        config = self.config
        queries = rotary_tables(position_ids, config.num_attention_heads, config.rope, dtype)
        if config.key_value_heads == config.num_attention_heads:
            return queries, queries
        return queries, rotary_tables(position_ids, config.key_value_heads, config.rope, dtype)


def _choose(states: paddle.Tensor, chosen: paddle.Tensor | None) -> paddle.Tensor:
    """Rows of [B, L, D] at flat positions [S] -> [S, D]; all of them, unchanged, where none are chosen."""
    return states if chosen is None else take_rows(states.reshape([-1, states.shape[-1]]), chosen)


def _first_chosen(
    chosen: paddle.Tensor | None, length: int, bias: Bias, cache: KVCache | None
) -> tuple[int, paddle.Tensor | None]:
    """How many queries at the beginning of every row nobody asks for, and the chosen flat positions among the rest.

    On CPU alone, where it costs nothing to look, and for rows of one sample each: an answer stands behind its image.
    """
    plain = isinstance(bias, paddle.Tensor) and bias.ndim == 2 and cache is None
    if chosen is None or not plain or not chosen.place.is_cpu_place():
        return 0, chosen
    columns = chosen % length
    first = int(columns.min())
    return first, (chosen // length) * (length - first) + columns - first


def _behind(tables: RotaryTables, first: int) -> RotaryTables:
    """The tables of the positions from `first` on."""
    cosines, sines, half_turn = tables
    return cosines[:, first:].contiguous(), sines[:, first:].contiguous(), half_turn


def _segments(
    segment_ids: paddle.Tensor | None, shape: list[int], cache: KVCache | None
) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
    """Segments of these positions and of all, cached ones included; remembered in the cache.

    Args:
        shape: [B, L] of these positions.

    Returns:
        int64 [B, L] and [B, S]; None twice where neither these nor the cached positions have segments.
    """
    before = cache.segment_ids if cache is not None else None
    if segment_ids is None and before is None:
        return None, None
    if segment_ids is None:
        segment_ids = paddle.ones(shape, dtype="int64")  # the number that a row's only sample has in a batch
    if cache is None:
        return segment_ids, segment_ids
    if before is None and cache.length:
        before = paddle.ones([shape[0], cache.length], dtype="int64")
    cache.segment_ids = segment_ids if before is None else paddle.concat([before, segment_ids], axis=1)
    return segment_ids, cache.segment_ids
