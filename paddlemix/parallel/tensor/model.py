"""LLaVA over the processes of a tensor group: a smaller model of the same kind, and hooks where its processes meet.

Each process has some heads, some of the inner width and some of the vocabulary, in ordinary layers of those sizes:
kernels, adapters and quantised layers need not know of it.  Tower, projector, newline and norms are whole everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import paddle
from paddle import nn

from paddlemix.models.configuration import LlavaConfig
from paddlemix.models.layers import DeferredNorm
from paddlemix.models.llava import LlavaModel
from paddlemix.parallel.layout import Layout
from paddlemix.parallel.tensor.block_edges import enter, joined, leave
from paddlemix.parallel.tensor.parts import mark, mark_linear, mark_partial
from paddlemix.parallel.tensor.split_plan import linear_parts, local_sizes, vocabulary_part
from paddlemix.parallel.tensor.split_vocabulary import Scored, SplitEmbedding, cross_entropy


class SplitLlavaModel(LlavaModel):
    """A LLaVA model of which this process has a part; see `LlavaModel`.

    Args:
        config: sizes of the whole.
        layout: of the run.

    Attributes:
        config: sizes of the whole; those of `language_model` are the part's.
        vocabulary: which tokens' embeddings and scores are here.

    Raises:
        UserError: the heads cannot be split by the degree.
    """

    def __init__(self, config: LlavaConfig, layout: Layout) -> None:
        degree, rank = layout.tensor_degree, layout.tensor_rank
        super().__init__(replace(config, text=local_sizes(config.text, degree, rank)))
        self.config, self.layout, decoder = config, layout, self.language_model
        self.vocabulary = vocabulary_part(config.text, degree, rank)
        mark(decoder.embed_tokens.weight, self.vocabulary)
        decoder.embed_tokens = SplitEmbedding(decoder.embed_tokens.weight, self.vocabulary, layout)
        if not config.text.tie_word_embeddings:
            mark_linear(self.lm_head, self.vocabulary.along(1))
        parts = linear_parts(config.text, degree, rank)
        for layer in decoder.layers:
            for block in (layer.self_attn, layer.mlp):
                block.register_forward_pre_hook(_entering(layout))
                block.register_forward_post_hook(_leaving(layout))
                for name, child in block.named_children():
                    mark_linear(child, parts[name])
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                mark_partial(norm.weight)

    def logits(self, hidden_states: paddle.Tensor) -> paddle.Tensor:
        """[..., D] -> scores over the whole vocabulary [..., V], on every process; without a gradient."""
        with paddle.no_grad():
            return joined(super().logits(hidden_states), self.config.text.vocab_size, self.layout)

    def cross_entropy(self, logits: paddle.Tensor, targets: paddle.Tensor) -> Scored:
        """As `split_vocabulary.cross_entropy`, of this process's scores."""
        return cross_entropy(logits, targets, self.vocabulary, self.layout)


def _entering(layout: Layout) -> Callable[[nn.Layer, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(block: nn.Layer, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        normed, *rest = inputs
        return DeferredNorm(normed.norm, enter(normed.hidden, layout)), *rest

    return hook


def _leaving(layout: Layout) -> Callable[[nn.Layer, tuple[Any, ...], paddle.Tensor], paddle.Tensor]:
    def hook(block: nn.Layer, inputs: tuple[Any, ...], outputs: paddle.Tensor) -> paddle.Tensor:
        # A bias after the sum is in the outputs of all processes, and counts once.  Its gradient is whole everywhere.
        projection = getattr(block, "o_proj", None)
        if projection is not None and projection.bias is not None and layout.tensor_rank > 0:
            outputs = outputs - projection.bias.detach().astype(outputs.dtype)
        return leave(outputs, layout)

    return hook
