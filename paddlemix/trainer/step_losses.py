"""Loss scaling for float16: gradients are computed of a scaled loss, and a step whose gradients overflow is left out.

Paddle's own asks the device for the overflow, hands an infinite norm to the clipping, and losses are asked for apart
from both; this one asks once per step, before clipping.  Its rule for the scale is Paddle's, which knows no least one:
a gradient that is NaN at every scale would leave out all steps to come and nobody would know, so a run ends below 1.
Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3.2.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle import _C_ops, _legacy_C_ops
from paddle.amp.grad_scaler import OptimizerState

from paddlemix.trainer.callbacks.stopping import StepLosses
from paddlemix.trainer.gradient_norm import MeasuredNorm

_LEAST_SCALE = 1.0  # gradients that are not even scaled fit float16, or the run is broken


class StepScaler(paddle.amp.GradScaler):
    """Scales the loss of one process's run.

    Args:
        scale: the first one, > 0.
        losses: of the steps; looks at everything at once.
    """

    _found_inf: paddle.Tensor

    def __init__(self, scale: float, losses: StepLosses) -> None:
        super().__init__(init_loss_scaling=scale)
        self._losses = losses

    def step(self, optimizer: paddle.optimizer.Optimizer) -> None:
        """One step of the optimiser, or none where a gradient overflowed.

        Raises:
            UserError: a loss is NaN or infinite, or a gradient is at the least scale.
        """
        if not self._enable:
            optimizer.step()
            return
        self._unscale(optimizer)
        clip: Any = optimizer._grad_clip
        measures = isinstance(clip, MeasuredNorm)
        parts = optimizer._parameter_list
        gradients = _master_gradients(parts) or [part.grad for part in parts if part.grad is not None]
        norm = clip.measure(gradients) if measures else None
        self._cache_found_inf, value = self._losses.overflows(self._found_inf, norm)
        if not self._cache_found_inf:
            if norm is not None and value is not None:
                clip.use(norm, value)
            optimizer.step()
        elif float(self._scale) <= _LEAST_SCALE:
            raise self._losses.no_scale_left(float(self._scale))
        self._optimizer_states[id(optimizer)]["state"] = OptimizerState.STEPPED

    def _unscale(self, optimizer: paddle.optimizer.Optimizer) -> None:
        """Paddle's, and the same for the float32 gradients of `amp_master_grad`, which stand where it does not look."""
        super()._unscale(optimizer)
        masters = _master_gradients(optimizer._parameter_list)
        if masters:
            _legacy_C_ops.check_finite_and_unscale(masters, self._scale, masters, self._temp_found_inf_fp32)
            self._found_inf = _C_ops.bitwise_or(self._found_inf, self._temp_found_inf_fp32)


def _master_gradients(parts: list[paddle.Tensor]) -> list[paddle.Tensor]:
    """Float32 gradients that Paddle's mixed precision keeps beside weights; none without `amp_master_grad`."""
    found = (getattr(part, "main_grad", None) for part in parts)
    return [gradient for gradient in found if gradient is not None]
