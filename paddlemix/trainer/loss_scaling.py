"""Loss scaling for float16: gradients are computed of a scaled loss, and a step whose gradients overflow is left out.

Paddle's own asks the device for the overflow, hands an infinite norm to the clipping, and losses are asked for apart
from both; this one asks once per step, before clipping.  Its rule for the scale is Paddle's.
Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3.2.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle.amp.grad_scaler import OptimizerState

from paddlemix.trainer.gradient_norm import MeasuredNorm
from paddlemix.trainer.guards import StepLosses


class StepScaler(paddle.amp.GradScaler):
    """Scales the loss of one process's run.

    Args:
        scale: the first one, > 0.
        losses: of the steps; looks at everything at once.
    """

    def __init__(self, scale: float, losses: StepLosses) -> None:
        super().__init__(init_loss_scaling=scale)
        self._losses = losses

    def step(self, optimizer: paddle.optimizer.Optimizer) -> None:
        """One step of the optimiser, or none where a gradient overflowed.

        Raises:
            UserError: a loss is NaN or infinite.
        """
        if not self._enable:
            optimizer.step()
            return
        self._unscale(optimizer)
        clip: Any = optimizer._grad_clip
        measures = isinstance(clip, MeasuredNorm)
        gradients = [part.grad for part in optimizer._parameter_list if part.grad is not None]
        norm = clip.measure(gradients) if measures else None
        self._cache_found_inf, value = self._losses.overflows(self._found_inf, norm)
        if not self._cache_found_inf:
            if norm is not None and value is not None:
                clip.use(norm, value)
            optimizer.step()
        self._optimizer_states[id(optimizer)]["state"] = OptimizerState.STEPPED
