"""The loss scale of float16, for one process and for several.

Losses, gradient norm and overflow are read from the device together, once per step, because every read waits for all
work that is queued there.  Paddle's own scaler reads the overflow by itself, before gradients are summed over
processes, and hands an infinite norm to the clipping.  Here the clip divides and looks, see `clipping`: it comes after
all sums, in every layout, and so all processes leave the same steps out.

Paddle's rule for the scale is kept, but that has no lower limit: a gradient that is NaN at every scale would skip all
steps to come and nobody would know, so here a run ends below 1.
Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3.2.
"""

from __future__ import annotations

from typing import Any

import paddle

from paddlemix.trainer.steps.clipping import MeasuredNorm
from paddlemix.trainer.steps.step_losses import StepLosses

_SMALLEST_SCALE = 1.0  # gradients that are not even scaled fit float16, or the run is broken


class StepScaler(paddle.amp.GradScaler):
    """Scales the losses of a run.

    Args:
        scale: the first one, > 0.
        losses: of the steps.
        processes: that gradients are averaged over.

    Attributes:
        clip: of the optimiser, which divides its gradients; set before the first step.
    """

    clip: MeasuredNorm

    def __init__(self, scale: float, losses: StepLosses, processes: int = 1) -> None:
        super().__init__(init_loss_scaling=scale)
        self._losses, self._processes = losses, processes

    def own_share(self, share: float) -> float:
        """What a loss is multiplied by before it is scaled.

        Args:
            share: the same without a scale, which makes up for the average over processes that follows.
        """
        # Otherwise gradients would be larger with each process, and overflow at a smaller scale; see `_summed`.
        return share / self._processes

    def step(self, optimizer: Any) -> None:
        """One step of the optimiser, which changes nothing where a gradient overflowed on any process.

        Raises:
            UserError: a loss is NaN or infinite, or a gradient is so at the smallest scale.
        """
        if not self._enable:
            optimizer.step()
            return
        self.clip.scale = self._scale
        optimizer.step()
        self._cache_found_inf = self.clip.left_out
        # Paddle would halve the scale for ever and skip every step.
        if self.clip.left_out and float(self._scale) <= _SMALLEST_SCALE:
            raise self._losses.no_scale_left(float(self._scale))
