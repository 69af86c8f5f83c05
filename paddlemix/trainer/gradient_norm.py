"""Clipping by the norm over all gradients, which keeps that norm for the reports.

Paddle's own computes it and throws it away.  For float32 gradients the arithmetic is the same, operation by operation,
and so are the bits; squares of narrower ones are summed in float32 too, because a sum above 65504 is infinite in
float16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle
from paddle import nn
from paddle.nn.clip import _squared_l2_norm

Pairs = list[tuple[paddle.Tensor, paddle.Tensor | None]]


class MeasuredNorm(nn.ClipGradByGlobalNorm):
    """Clips and keeps the norm before clipping.

    The optimiser calls it with the gradients that it is about to use: summed over micro-batches and processes, and free
    of the loss scale.

    Args:
        limit: longest gradient, > 0; None measures and clips nothing.

    Attributes:
        check: is shown the norm before any weight changes, None where no weight has a gradient; gives it as a number,
            and may raise.
    """

    def __init__(self, limit: float | None) -> None:
        super().__init__(limit or 1.0)
        self._clips = limit is not None
        self._norm: paddle.Tensor | float | None = None
        self._ahead: paddle.Tensor | None = None
        self.check: Callable[[paddle.Tensor | None], float | None] | None = None

    def take(self) -> float | None:
        """The norm of the last step, once; None where the optimiser made none since, as on a float16 overflow."""
        norm, self._norm = self._norm, None
        return None if norm is None else float(norm)

    @paddle.no_grad()
    def measure(self, gradients: list[paddle.Tensor]) -> paddle.Tensor | None:
        """float32 scalar, the norm over some gradients; None where there are none."""
        if not gradients:
            return None
        wide = (part if part.dtype == paddle.float32 else part.astype("float32") for part in gradients)
        squares = [_squared_l2_norm(gradient) for gradient in wide]
        return paddle.sqrt(paddle.stack(squares).sum())

    def use(self, norm: paddle.Tensor, value: float) -> None:
        """Takes the norm of the gradients that the optimiser is about to use, which is then not measured again.

        Args:
            norm: float32 scalar.
            value: the same number.
        """
        self._ahead, self._norm = norm, value

    @paddle.no_grad()
    def _dygraph_clip(self, params_grads: Pairs) -> Pairs:
        gradients = [gradient for _, gradient in params_grads if gradient is not None]
        norm, self._ahead = self._ahead, None
        if norm is None:
            norm = self.measure(gradients)
            self._norm = norm if self.check is None else self.check(norm)
        if self._clips and norm is not None:
            limit = paddle.full([1], self.clip_norm, dtype="float32")
            factor = limit / paddle.maximum(norm, limit)
            for gradient in gradients:
                gradient.multiply_(factor.astype(gradient.dtype))
        return params_grads


def gradient_clip(limit: float, is_sharded: bool) -> Any:
    """What an optimiser gets as `grad_clip`.

    Args:
        limit: longest gradient; 0 clips nothing.
        is_sharded: no process has all gradients: Fleet then puts its own clipping in place of Paddle's, and nothing is
            measured.

    Returns:
        A clip, or None.
    """
    if is_sharded:
        return nn.ClipGradByGlobalNorm(limit) if limit > 0 else None
    return MeasuredNorm(limit if limit > 0 else None)
