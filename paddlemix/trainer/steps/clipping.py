"""One norm over the gradients of all parts, in every layout: it is reported, looked at, and clipped by.

Paddle's clip computes the norm and throws it away, and Fleet puts others in place of that class where something is
shared; this one is no child of it.  With one process the arithmetic is Paddle's for float32 gradients, operation by
operation, and so are the bits; squares of narrower ones are summed in float32 too, because a sum above 65504 is
infinite in float16.

The optimiser calls it last before it changes weights, after every sum over processes.  Which gradients it gets, read in
Paddle 3.3.1:

    nothing shared      all, the same on every process
    stage1, stage2      those of the weights that this process keeps the optimiser's states of: no other has them
    stage3              slices of large weights, each process its own; small weights whole (marked `unslice`)

In a tensor group each process has parts of some weights (`parallel.tensor.parts`) and their gradients; other weights
are whole in all of them, and their gradients the same once `partial_gradients` has joined them.
"""

from __future__ import annotations

import paddle
import paddle.distributed as dist
from paddle import _legacy_C_ops
from paddle.nn.clip import ClipGradBase, _squared_l2_norm

from paddlemix.parallel.layout import ALONE, Layout
from paddlemix.parallel.tensor.parts import part_of
from paddlemix.trainer.steps.partial_gradients import join_gradients
from paddlemix.trainer.steps.step_losses import StepLosses

Pairs = list[tuple[paddle.Tensor, paddle.Tensor | None]]  # (parameter, gradient), as paddle passes them to a clip


class MeasuredNorm(ClipGradBase):
    """Clips and keeps the norm before clipping.

    Args:
        limit: longest gradient, > 0; None clips nothing and only measures.
        layout: which gradients the other processes have.
        losses: of the step, read together with the norm; raises where a number is NaN or infinite.  None: nothing is
            checked.

    Attributes:
        scale: float32 [1], what the losses of the next step were multiplied by; its gradients are divided by it.  None
            where they were not.
        left_out: whether the last step's scaled gradients overflowed, so that it changes no weight.
    """

    def __init__(self, limit: float | None, layout: Layout = ALONE, losses: StepLosses | None = None) -> None:
        super().__init__()
        self.scale: paddle.Tensor | None = None
        self.left_out = False
        self._limit, self._layout, self._losses = limit, layout, losses
        self._norm: paddle.Tensor | float | None = None

    def take(self) -> float | None:
        """The norm of the last step, once; None where it changed no weight, as on a float16 overflow."""
        norm, self._norm = self._norm, None
        return None if norm is None else float(norm)

    @paddle.no_grad()
    def _dygraph_clip(self, params_grads: Pairs) -> Pairs:
        pairs = [(parameter, gradient) for parameter, gradient in params_grads if gradient is not None]
        join_gradients(pairs, self._layout)
        gradients = [gradient for _, gradient in pairs]
        # Divided first, so that the norm is that of the true gradient.
        overflow = None if self.scale is None else _divided(_summed(gradients, self._layout), self.scale)
        norm, overflow = self._measured(pairs, overflow)
        if self._checked(norm, overflow):
            return []  # the optimiser has nothing to do
        if self._limit is not None and norm is not None:
            # Paddle's formula, limit / max(norm, limit), so that the bits are Paddle's; no branch, so nothing is waited
            # for.
            limit = paddle.full([1], self._limit, dtype="float32")
            factor = limit / paddle.maximum(norm, limit)
            for gradient in gradients:
                gradient.multiply_(factor.astype(gradient.dtype))
        return params_grads

    def _measured(
        self, pairs: Pairs, overflow: paddle.Tensor | None
    ) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        """The norm (float32 scalar, None where no weight has a gradient) and the overflow, over all processes."""
        if self._layout.tensor_degree > 1:
            return self._measured_in_parts(pairs, overflow)
        if not self._layout.stage:
            total = sum_of_squares([gradient for _, gradient in pairs])
            return None if total is None else paddle.sqrt(total), overflow
        has_slices = self._layout.stage == "stage3"
        whole = [gradient for parameter, gradient in pairs if has_slices and hasattr(parameter, "unslice")]
        parts = [gradient for parameter, gradient in pairs if not (has_slices and hasattr(parameter, "unslice"))]
        # One sum for both.  A process may have no part, where weights are fewer than processes.
        own = [_or_nothing(sum_of_squares(parts)), _or_nothing(overflow)]
        sums = paddle.stack(own)
        dist.all_reduce(sums, group=self._layout.sharding_group)
        total = sums[0] + _or_nothing(sum_of_squares(whole))
        return paddle.sqrt(total), None if overflow is None else sums[1]

    def _measured_in_parts(
        self, pairs: Pairs, overflow: paddle.Tensor | None
    ) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        """As `_measured`, of a model that a tensor group shares."""
        layout = self._layout
        if not pairs and not layout.stage:
            return None, overflow
        parts = [gradient for parameter, gradient in pairs if part_of(parameter) is not None]
        whole = [gradient for parameter, gradient in pairs if part_of(parameter) is None]
        # What all hold counts once, by a share of each: so the sum is one number everywhere, and with it what every
        # gradient is multiplied by.
        share = 1.0 / layout.tensor_degree  # a factor: NPU divides by a number on the host
        squares = _or_nothing(sum_of_squares(parts)) + _or_nothing(sum_of_squares(whole)) * share
        sums = paddle.stack([squares, _or_nothing(overflow)])
        dist.all_reduce(sums, group=layout.tensor_group)
        if layout.stage:
            dist.all_reduce(sums, group=layout.sharding_group)
        return paddle.sqrt(sums[0]), None if overflow is None else sums[1]

    def _checked(self, norm: paddle.Tensor | None, overflow: paddle.Tensor | None) -> bool:
        """Whether to leave the step out."""
        self._norm, self.left_out, self.scale = norm, False, None
        if self._losses is not None and overflow is None:
            self._norm = self._losses.check_gradient(norm)
        elif self._losses is not None and overflow is not None:
            self.left_out, value = self._losses.overflows(overflow, norm)
            self._norm = None if self.left_out else value
        return self.left_out


def sum_of_squares(gradients: list[paddle.Tensor]) -> paddle.Tensor | None:
    """float32 scalar over all numbers of some gradients; None where there are none."""
    if not gradients:
        return None
    # Squares of float16 overflow above 255.
    wide = (part if part.dtype == paddle.float32 else part.astype("float32") for part in gradients)
    return paddle.stack([_squared_l2_norm(gradient) for gradient in wide]).sum()


def _or_nothing(value: paddle.Tensor | None) -> paddle.Tensor:
    """float32 scalar; 0 for None."""
    return paddle.zeros([], dtype="float32") if value is None else value


def _summed(gradients: list[paddle.Tensor], layout: Layout) -> list[paddle.Tensor]:
    """Turns averages over processes into sums in place; returns them.

    A scaled loss is not multiplied by the number of processes, or float16 would overflow at a smaller scale with each.
    The sum overflows where that of one process, over its micro-batches, does.
    """
    if layout.data_size > 1:
        for gradient in gradients:
            gradient.scale_(float(layout.data_size))
    return gradients


def _divided(gradients: list[paddle.Tensor], scale: paddle.Tensor) -> paddle.Tensor:
    """Divides gradients by the loss scale in place.

    Returns:
        float32 scalar, above 0 where one is NaN or infinite.
    """
    found = []
    for dtype in (paddle.float16, paddle.bfloat16, paddle.float32):
        same = [gradient for gradient in gradients if gradient.dtype == dtype]
        if same:
            overflow = paddle.zeros([1], dtype="bool")
            _legacy_C_ops.check_finite_and_unscale(same, scale, same, overflow)
            found.append(overflow.astype("float32").reshape([]))
    return sum(found[1:], found[0]) if found else paddle.zeros([], dtype="float32")
