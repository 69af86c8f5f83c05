"""The loss: cross entropy of the next token on supervised positions alone, in float32.

The output layer runs on those positions only, and on a part of them at a time, so the full [B, L, V] logits never
exist and none are kept: gradients of a part's logits are made in their place at once.  The last decoder layer leaves
the other positions out too.  Means are taken over the supervised tokens of a whole optimiser step, whatever
micro-batches and devices it is split into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import paddle
from paddle import nn
from paddle.autograd import PyLayer

from paddlemix.models.kernels import cpu, cpu_library
from paddlemix.models.kernels.cached_constants import cached_range
from paddlemix.models.kernels.operators import on_cpu, row_sums
from paddlemix.models.layers import between_hooks
from paddlemix.models.llava import LlavaModel
from paddlemix.parallel.tensor.block_edges import enter
from paddlemix.parallel.tensor.model import SplitLlavaModel

_LOGITS_AT_ONCE, _LOGITS_WITHOUT_GRADIENT, _LOGITS_OFF_CPU = 2**24, 2**22, 2**26  # see `head_rows_at_once`


def head_rows_at_once(vocab_size: int, adds_parts: bool, on_cpu: bool) -> int:
    """Positions whose logits exist together.

        off the CPU                                  2**26 numbers: on a card, few large products are fastest
        on CPU, gradients of parts are added up      2**24: each part costs a sum of the size of the output layer
        on CPU, else                                 2**22: logits stay near the processor

    Args:
        adds_parts: whether the output layer trains and no kernel adds its gradient up in place.

    Returns:
        At least 1.
    """
    numbers = _LOGITS_OFF_CPU if not on_cpu else _LOGITS_AT_ONCE if adds_parts else _LOGITS_WITHOUT_GRADIENT
    return max(1, numbers // vocab_size)


class LossModel(nn.Layer):
    """A model together with its loss, as the Trainer and data-parallel wrappers need it.

    Args:
        model: any LLaVA or text-only model.
    """

    def __init__(self, model: LlavaModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        loss_index: paddle.Tensor,
        loss_targets: paddle.Tensor,
        position_ids: paddle.Tensor,
        segment_ids: Any = None,
        **inputs: Any,
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Summed loss of a batch.

        Args:
            loss_index: int64 [S], flat positions whose next token is supervised.
            loss_targets: int64 [S], those tokens.
            position_ids, segment_ids: see `Decoder.forward`.
            inputs: arguments of `LlavaModel.embed`.

        Returns:
            Sum of the S losses (float32 scalar) and the number of right guesses (int64 scalar).  Logits that are
            NaN make the sum NaN.
        """
        embeds, decoder = self.model.embed(**inputs), self.model.language_model
        # Nothing to learn: the same way for position 0, times zero, because every weight needs its gradient of zeros.
        learns = len(loss_index) > 0
        if not learns:
            loss_index, loss_targets = (paddle.zeros([1], dtype="int64") for _ in range(2))
        # The last decoder layer computes the supervised positions alone.
        supervised = decoder(embeds, position_ids, segment_ids, output_index=loss_index)
        # One call for all parts: processes that share the output layer's weight make the same calls, however many
        # positions each has.
        loss_sum, right = between_hooks(
            self.model.output_layer, lambda hidden: self._summed_loss(hidden, loss_targets), supervised
        )
        return (loss_sum, right) if learns else (loss_sum * 0.0, right * 0)

    def _summed_loss(self, supervised: paddle.Tensor, targets: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        """[S, D] and int64 [S] -> summed loss and right guesses, between the hooks of the output layer."""
        weights = [weight for weight in self.model.output_weights() if not weight.stop_gradient]
        # How the gradient of the output layer is computed:
        #   frozen, or no gradient wanted     not at all
        #   plain layer, supported in C       added up in place, part by part (`total`)
        #   plain layer                       a product per part, the parts added
        #   anything else (adapter, tied)     paddle's own gradient per part, the parts added
        plain, with_gradient = self._plain_head(), paddle.is_grad_enabled()
        total = None
        if plain is not None and weights and with_gradient and cpu_library.supports_products(plain, supervised):
            total = paddle.zeros(plain.shape, dtype="float32")
        adds_parts = bool(weights) and total is None
        rows_at_once = head_rows_at_once(self.model.config.text.vocab_size, adds_parts, on_cpu(supervised))
        cross_entropy = _cross_entropy
        if isinstance(self.model, SplitLlavaModel):  # this process has the scores of some tokens
            supervised, cross_entropy = enter(supervised, self.model.layout), self.model.cross_entropy
        head = _Head(self.model.scores, rows_at_once, with_gradient, plain, total, cross_entropy)
        return _SummedCrossEntropy.apply(supervised, targets, head, *weights)

    def _plain_head(self) -> paddle.Tensor | None:
        """The output layer's weight, where its logits and gradients are products with it and no more."""
        layer: Any = getattr(self.model, "lm_head", None)
        if type(layer) is not nn.Linear or layer.bias is not None or paddle.amp.is_autocast_enabled():
            return None
        return layer.weight


@dataclass(frozen=True)
class _Head:
    """The output layer and how to run it.

    Args:
        logits: [rows, D] -> [rows, V].
        rows_at_once: >= 1.
        with_gradient: whether a backward pass will follow.
        weight: [D, V], where the layer is the product with it alone; automatic gradients keep a copy of the logits.
        total: zeros [D, V] that the weight's gradient is added up in, where a kernel can; else parts are added.
        cross_entropy: of logits [rows, V] and targets, see `_cross_entropy`.
    """

    logits: Callable[[paddle.Tensor], paddle.Tensor]
    rows_at_once: int
    with_gradient: bool
    weight: paddle.Tensor | None
    total: paddle.Tensor | None
    cross_entropy: Callable[[paddle.Tensor, paddle.Tensor], tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]]


class _SummedCrossEntropy(PyLayer):
    """Sum over rows of log(sum(exp(logits))) - logits[target].  The gradients are computed along with it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: paddle.Tensor, targets: paddle.Tensor, head: _Head, *weights: paddle.Tensor
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """[S, D], int64 [S] and the head's trained weights -> float32 and int64 scalars, see `LossModel`."""
        # Under `no_grad` and below the first trained weight nothing flows back.
        ctx.hidden_trains = head.with_gradient and not hidden.stop_gradient
        losses: list[paddle.Tensor] = []
        rights: list[paddle.Tensor] = []
        hidden_grads: list[paddle.Tensor] = []
        weight_grads: list[paddle.Tensor] = []
        for start in range(0, len(targets), head.rows_at_once):
            part = slice(start, start + head.rows_at_once)
            # A graph of its own for each part, which ends here and is freed with the part.
            rows = hidden[part].detach()
            rows.stop_gradient = not ctx.hidden_trains
            score = _score_plain if head.weight is not None else _score
            loss, right, grads = score(head, rows, targets[part], weights)
            if ctx.hidden_trains:
                hidden_grads.append(grads.pop(0))
            # in the weights' type: in bfloat16 two parts' sum is off by 2.4e-3, as a float32 sum's; four parts' by
            # 3.1e-3 (2.3e-3), eight by 3.9e-3 (2.2e-3).  The float32 sum takes a 7B another 0.8 to 3.7 GB.
            weight_grads = grads if not losses else [a.add_(b) for a, b in zip(weight_grads, grads, strict=True)]
            losses.append(loss)
            rights.append(right)
        ctx.hidden_grad = paddle.concat(hidden_grads) if hidden_grads else None
        ctx.weight_grads = weight_grads if head.total is None else [head.total]
        return sum(losses[1:], losses[0]), sum(rights[1:], rights[0])

    @staticmethod
    def backward(ctx: Any, loss_grad: paddle.Tensor, _: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        """Gradients of hidden states, targets (none) and weights.  Once only: they are scaled in place."""
        grads = [ctx.hidden_grad, None, *ctx.weight_grads]
        ctx.hidden_grad = ctx.weight_grads = None
        return tuple(None if grad is None else grad.multiply_(loss_grad.astype(grad.dtype)) for grad in grads)


_Scored = tuple[paddle.Tensor, paddle.Tensor, list[paddle.Tensor]]


def _score(head: _Head, rows: paddle.Tensor, targets: paddle.Tensor, weights: Sequence[paddle.Tensor]) -> _Scored:
    """Summed loss, right guesses and the gradients of rows, if they train, and weights: by paddle's own gradients."""
    with paddle.set_grad_enabled(head.with_gradient):
        logits = head.logits(rows)
    loss, right, logits_grad = head.cross_entropy(logits.detach(), targets)
    sources = [*([] if rows.stop_gradient else [rows]), *weights]
    if logits.stop_gradient or not sources:
        return loss, right, []
    return loss, right, paddle.grad([logits], sources, grad_outputs=[logits_grad])


def _score_plain(head: _Head, rows: paddle.Tensor, targets: paddle.Tensor, weights: Sequence[paddle.Tensor]) -> _Scored:
    """As `_score`, by products with `head.weight`; `weights` is that one or empty."""
    assert head.weight is not None
    loss, right, logits_grad = head.cross_entropy(paddle.matmul(rows, head.weight), targets)
    grads = [] if rows.stop_gradient else [paddle.matmul(logits_grad, head.weight, transpose_y=True)]
    if head.total is not None:
        cpu.add_outer_(head.total, rows, logits_grad)
    elif weights and head.with_gradient:
        grads.append(paddle.matmul(rows, logits_grad, transpose_x=True))
    return loss, right, grads


def _cross_entropy(logits: paddle.Tensor, targets: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """Summed loss (float32 scalar), right guesses (int64 scalar) and the gradient of the logits in their place.

    Args:
        logits: [rows, V], overwritten.
        targets: int64 [rows].
    """
    rows, size = logits.shape
    if cpu_library.is_supported(logits):
        losses, rights = cpu.cross_entropy_(logits, targets)
        return losses.sum(), rights.sum(), logits
    scores = logits.astype("float32")
    right = (scores.argmax(axis=-1) == targets).astype("int64").sum()  # of equal ones the first, as in greedy answers
    scores.subtract_(scores.max(axis=-1, keepdim=True))
    places = cached_range(rows) * size + targets
    found = paddle.gather(scores.reshape([-1]), places)  # [rows]
    scores.exp_()
    sums = row_sums(scores)
    loss = (paddle.log(sums).reshape([rows]) - found).sum()
    scores.multiply_(1.0 / sums).reshape_([-1])
    hits = paddle.gather(scores, places) - 1.0
    scores.scatter_(places, hits).reshape_([rows, size])  # no place is named twice
    return loss, right, scores.astype(logits.dtype)
