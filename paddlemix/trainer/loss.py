"""The loss: cross entropy of the next token on supervised positions alone, in float32.

The output layer runs on those positions only, so the full [B, L, V] logits never exist.  Means are taken over the
supervised tokens of a whole optimiser step, whatever micro-batches and devices it is split into.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn
from paddle.nn import functional

from paddlemix.models.llava import LlavaModel


class LossModel(nn.Layer):
    """A model together with its loss, as the Trainer and data-parallel wrappers want it.

    Args:
        model: any LLaVA or text-only model.
    """

    def __init__(self, model: LlavaModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, loss_index: paddle.Tensor, loss_targets: paddle.Tensor, **batch: Any
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Summed loss of a batch.

        Args:
            loss_index: int64 [S], flat positions whose next token is supervised.
            loss_targets: int64 [S], those tokens.
            batch: arguments of `LlavaModel.forward`.

        Returns:
            Sum of the S losses (float32 scalar) and the number of right guesses (int64 scalar).
        """
        hidden = self.model(**batch)
        chosen = paddle.gather(hidden.reshape([-1, hidden.shape[-1]]), loss_index)
        logits = self.model.logits(chosen)
        losses = functional.cross_entropy(logits.astype("float32"), loss_targets, reduction="none")
        right = (logits.detach().argmax(axis=-1) == loss_targets).astype("int64").sum()
        # paddle's CPU softmax makes log V of NaN logits: a model that is broken would seem to train
        broken = logits.detach().astype("float32").sum() * 0.0
        return losses.sum() + broken, right
