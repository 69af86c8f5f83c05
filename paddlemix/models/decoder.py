"""The language model: a Llama-style decoder from embeddings to hidden states.

Attention, feed-forward part, layer, model, in this order; sizes are in `DecoderConfig`, and model families differ in
these alone.  It knows no image and no token but its own.  Logits are taken from the hidden states by the caller.
Shapes: B batch, L positions, D width, H query heads, K key/value heads, E head width.
Source: Touvron et al. 2023, "LLaMA"; numbers checked against transformers' LlamaModel, MistralModel and Qwen2Model.
"""

from __future__ import annotations

from dataclasses import dataclass

import paddle
from paddle import nn
from paddle.distributed.fleet.utils import recompute

from paddlemix.models.attention import AttentionMask, attend, attention_mask
from paddlemix.models.configuration import DecoderConfig
from paddlemix.models.kernels.operators import on_cpu, take_rows
from paddlemix.models.kv_cache import KVCache
from paddlemix.models.layers import DeferredNorm, RMSNorm, apply_linear, linear, normal, swiglu_linear
from paddlemix.models.rotary import RotaryPositions


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
        normed: DeferredNorm,
        rotary: RotaryPositions,
        mask: AttentionMask,
        cache: KVCache | None,
        outputs: OutputPositions | None = None,
    ) -> paddle.Tensor:
        """[B, L, D] -> [B, L, D], or [S, D] of the output positions."""
        batch, length, _ = normed.hidden.shape
        # In the last layer nobody reads what leading queries of a row attend to, e.g. those of an image before its
        # answer; their keys and values are needed by the others.
        first = outputs.first if outputs is not None else 0
        if first:
            queries = self.q_proj(normed.computed(first))
            keys, values = normed.linears(self.k_proj, self.v_proj)
            mask, rotary = mask.after(first), rotary.after(first)
        else:
            queries, keys, values = normed.linears(self.q_proj, self.k_proj, self.v_proj)

        # [B, L, heads * E] -> [B, L, heads, E]
        queries = queries.reshape([batch, length - first, self.heads, self.head_size])
        keys = keys.reshape([batch, length, self.key_value_heads, self.head_size])
        values = values.reshape([batch, length, self.key_value_heads, self.head_size])

        # The cache holds keys that are already turned: a position never changes.
        queries, keys = rotary.turn(queries, keys)
        if cache is not None:
            keys, values = cache.append(self.layer, keys, values)

        attended = attend(queries, keys, values, mask)  # [B, L - first, H * E]
        return apply_linear(self.o_proj, attended if outputs is None else outputs.of_attended(attended))


class DecoderMLP(nn.Layer):
    """Gated feed-forward part: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, inner, std = config.hidden_size, config.intermediate_size, config.initializer_range
        self.gate_proj = linear(width, inner, std)
        self.up_proj = linear(width, inner, std)
        self.down_proj = linear(inner, width, std)

    def forward(self, normed: DeferredNorm) -> paddle.Tensor:
        """[..., D] -> [..., D]."""
        gate, up = normed.linears(self.gate_proj, self.up_proj)
        return swiglu_linear(self.down_proj, gate, up)


class DecoderLayer(nn.Layer):
    """Attention and feed-forward part, each after a norm and added to its input."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DecoderAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = DecoderMLP(config)

    def forward(
        self,
        hidden: paddle.Tensor,
        rotary: RotaryPositions,
        mask: AttentionMask,
        cache: KVCache | None,
        outputs: OutputPositions | None = None,
    ) -> paddle.Tensor:
        """[B, L, D] -> [B, L, D], or [S, D] of the output positions."""
        residual = hidden if outputs is None else outputs.of_all(hidden)
        hidden = residual + self.self_attn(self.input_layernorm.deferred(hidden), rotary, mask, cache, outputs)
        return hidden + self.mlp(self.post_attention_layernorm.deferred(hidden))


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
        output_index: paddle.Tensor | None = None,
    ) -> paddle.Tensor:
        """Runs all layers.

        Args:
            embeds: [B, L, D].
            position_ids: int64 [B, L], of these tokens.
            segment_ids: int64 [B, L] where rows are packed or padded on the left; None for rows of one sample each that
                begin at position 0.
            cache: positions seen before; these tokens are added to it.
            output_index: int64 [S], the flat positions whose hidden states are wanted; None for all.  The last layer
                computes only keys and values of the others.

        Returns:
            Hidden states after the final norm, [B, L, D], or [S, D] of the output positions.
        """
        config, length, seen = self.config, embeds.shape[1], cache.length if cache is not None else 0
        segments = segment_ids, segment_ids
        if cache is not None:
            segments = cache.extend_segments(segment_ids, embeds.shape[:2])
        # Mask and rotary positions depend on positions alone, so all layers share them.
        mask = attention_mask(length, seen + length, *segments, config.sliding_window)
        heads = config.num_attention_heads, config.key_value_heads
        rotary = RotaryPositions.of(position_ids, *heads, config.rope, embeds.dtype)
        outputs = None
        if output_index is not None:
            outputs = output_positions(output_index, length, skips=mask.is_causal_matrix and cache is None)

        hidden = embeds
        for number, layer in enumerate(self.layers, start=1):
            # Every other layer computes all positions, because the next one attends to them.
            wanted = outputs if number == len(self.layers) else None
            if self.enable_recompute and self.training and cache is None:
                # the reentrant form returns no gradient at all where the embeddings are frozen, as with LoRA
                hidden = recompute(layer, hidden, rotary, mask, None, wanted, use_reentrant=False)
            else:
                hidden = layer(hidden, rotary, mask, cache, wanted)
        return self.norm(hidden)


@dataclass(frozen=True)
class OutputPositions:
    """The positions that leave the last layer.

    Args:
        index: int64 [S], among all flat positions [B * L].
        first: of every row, the first position that is one of them or comes after one.
        attended_index: int64 [S], among the flat positions from `first` on, [B * (L - first)].
    """

    index: paddle.Tensor
    first: int
    attended_index: paddle.Tensor

    def of_all(self, states: paddle.Tensor) -> paddle.Tensor:
        """[B, L, D] -> [S, D]."""
        return take_rows(states.reshape([-1, states.shape[-1]]), self.index)

    def of_attended(self, states: paddle.Tensor) -> paddle.Tensor:
        """[B, L - first, D] -> [S, D]."""
        return take_rows(states.reshape([-1, states.shape[-1]]), self.attended_index)


def output_positions(index: paddle.Tensor, length: int, skips: bool) -> OutputPositions:
    """The output positions of rows of L tokens.

    Args:
        skips: leave out the queries before the first output position of any row, e.g. an image before its answer.
    """
    # Only on CPU, where looking at an index costs nothing; a card would have to wait for the host.
    if not skips or not on_cpu(index):
        return OutputPositions(index, 0, index)
    columns = index % length
    first = int(columns.min())
    return OutputPositions(index, first, (index // length) * (length - first) + columns - first)
