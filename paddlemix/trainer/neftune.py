"""NEFTune: noise on the embeddings that the language model reads, in training alone.

    embeds + uniform(-1, 1) * alpha / sqrt(L * D)        L tokens of the sample, D width

It does not know the step: its random numbers are those that `SeedEachStep` seeds, so that a resumed run draws the same.
Source: Jain et al. 2023, "NEFTune: Noisy Embeddings Improve Instruction Finetuning", algorithm 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from paddle import nn

from paddlemix.models.attention import SegmentLengths


def add_neftune(language_model: nn.Layer, alpha: float) -> None:
    """Adds noise to a decoder's input while it is in training mode; text and visual tokens alike.

    Args:
        language_model: a `Decoder`; nothing else of it changes, and no file shows it.
        alpha: strength, >= 0.  The paper uses 5 to 15.
    """

    def noisy(layer: nn.Layer, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not layer.training or not alpha:
            return None
        embeds, position_ids, *rest = inputs
        lengths = sample_lengths(position_ids, rest[0] if rest else None)
        bound = alpha / paddle.sqrt(lengths.astype("float32") * embeds.shape[-1])  # [B, L]
        # Drawn in float32 whatever the embeddings are, so that a seed means the same in every precision.
        noise = paddle.uniform(embeds.shape, dtype="float32", min=-1.0, max=1.0) * bound.unsqueeze(-1)
        return embeds + noise.astype(embeds.dtype), position_ids, *rest

    language_model.register_forward_pre_hook(noisy)


def sample_lengths(position_ids: paddle.Tensor, segment_ids: Any = None) -> paddle.Tensor:
    """int64 [B, L]: tokens of the sample that a position belongs to; any number for padding.

    Args:
        position_ids: int64 [B, L]; those of a sample count from 0.
        segment_ids: as the decoder takes them; None where a row holds one sample, padded on the right.
    """
    if segment_ids is None:  # positions of padding are 0
        return (position_ids.max(axis=1, keepdim=True) + 1).expand_as(position_ids)
    if isinstance(segment_ids, SegmentLengths):
        runs = np.repeat(segment_ids.lengths, segment_ids.lengths)  # known to the host
        return paddle.to_tensor(runs, dtype="int64").reshape(position_ids.shape)
    same = segment_ids.unsqueeze(1) == segment_ids.unsqueeze(2)  # [B, L, L]
    return same.astype("int64").sum(axis=-1)
