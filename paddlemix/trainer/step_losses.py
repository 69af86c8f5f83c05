"""The losses of a step, inspected before the optimiser uses their gradients, and their scale in float16.

Losses, gradient norm and overflow are read from the device together, once per step, because every read waits for all
work that is queued there.  Paddle's own scaler reads the overflow by itself and hands an infinite norm to the clipping.
Its rule for the scale is kept, but that has no lower limit: a gradient that is NaN at every scale would skip all steps
to come and nobody would know, so here a run ends below 1.
Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import paddle
from paddle import _C_ops, _legacy_C_ops
from paddle.amp.grad_scaler import OptimizerState

from paddlemix.errors import UserError
from paddlemix.trainer.optim import MeasuredNorm

_SMALLEST_SCALE = 1.0  # gradients that are not even scaled fit float16, or the run is broken


class StepLosses:
    """The losses of one optimiser step's micro-batches, and the samples each is of.

    They are read from the device once per step, together with the gradient's norm: every read waits until the device is
    done.  A report shows the numbers of that one read.

    Args:
        broken_weight: called where a loss is NaN or infinite; returns what to report where a weight is so already, None
            where all are finite.

    Attributes:
        waits: whether `check` leaves the reading to `check_gradient` or `overflows`, which know the gradients.
    """

    def __init__(self, broken_weight: Callable[[], str | None] = lambda: None) -> None:
        self.waits = False
        self._broken_weight = broken_weight
        self._losses: list[tuple[paddle.Tensor, float, Sequence[str]]] = []
        self._total = np.float32(0)
        self._step, self._sources = 0, ""  # of the losses that were read last

    def add(self, loss: paddle.Tensor, share: float, sources: Sequence[str]) -> None:
        """Keeps a micro-batch's loss for the next read.

        Args:
            loss: summed over its supervised tokens, float32 scalar.
            share: what it is multiplied by in the loss of the step.
        """
        self._losses.append((loss.detach(), share, sources))

    def check(self, step: int) -> None:
        """Checks the losses before the optimiser uses their gradients, unless another check follows that reads them.

        Args:
            step: optimiser steps done.

        Raises:
            UserError: one is NaN or infinite; names the samples.
        """
        self._step = step + 1
        self._sources = "; ".join(source for _, _, sources in self._losses for source in sources)
        if not self.waits:
            self._read()

    def check_gradient(self, norm: paddle.Tensor | None) -> float | None:
        """Checks the losses and the gradient's norm over all weights, before the optimiser changes one.

        Args:
            norm: float32 scalar; None where no weight has a gradient.

        Returns:
            The norm.

        Raises:
            UserError: a loss or the norm is NaN or infinite; names the samples.
        """
        # A step in which no weight got a gradient: of text alone, where only the projector trains.
        if norm is None:
            self._read()
            return None
        [value] = self._read(norm)
        if not math.isfinite(value):
            raise self._not_finite("gradient's norm", value, self._sources)
        return value

    def overflows(self, found: paddle.Tensor, norm: paddle.Tensor | None) -> tuple[bool, float | None]:
        """Checks the losses and what loss scaling found; a step whose gradients are too large is left out.

        Args:
            found: bool [1], whether a gradient is NaN or infinite.
            norm: see `check_gradient`.

        Returns:
            Whether to leave the step out, and the norm.

        Raises:
            UserError: a loss is NaN or infinite, which no scale can mend; names the samples.
        """
        found = found.astype("float32").reshape([])
        values = self._read(found) if norm is None else self._read(found, norm)
        return bool(values[0]), None if norm is None else values[1]

    def no_scale_left(self, scale: float) -> UserError:
        """The error where a gradient is NaN or infinite at the smallest loss scale that is tried."""
        return self._not_finite("gradient", f"NaN or infinite at a loss scale of {scale:g}", self._sources)

    def take_total(self) -> float:
        """Sum of the losses of all steps since the last call, each micro-batch's times its share."""
        self._read()
        total, self._total = float(self._total), np.float32(0)
        return total

    def _read(self, *more: paddle.Tensor) -> list[float]:
        """Brings losses and further float32 scalars to the host in one copy; returns the latter."""
        losses, self._losses = self._losses, []
        if not losses and not more:
            return []
        # One copy for everything: each copy of its own would wait for the device again.
        values = paddle.stack([loss for loss, _, _ in losses] + list(more)).numpy()
        for value, (_, share, sources) in zip(values, losses, strict=False):
            if not math.isfinite(value):
                raise self._not_finite("loss", float(value), "; ".join(sources))
            self._total += value * np.float32(share)  # in the order and type that a device would add them
        return [float(value) for value in values[len(losses) :]]

    def _not_finite(self, what: str, value: float | str, sources: str) -> UserError:
        # A weight that is broken already explains the loss better than the samples do.
        found, broken = f"the {what} of step {self._step} is {value}", self._broken_weight()
        if broken is not None:
            return UserError(f"{found}, because {broken}")
        return UserError(
            f"{found} in the batch of {sources}. No weight was changed by it and the last checkpoint is untouched: "
            "inspect these samples, lower learning_rate, or set max_grad_norm above 0"
        )


def broken_weight(model: paddle.nn.Layer) -> str | None:
    """The name of the first weight of a model that holds NaN or infinity; None where all numbers are finite."""
    for name, parameter in model.named_parameters():
        # One read per weight, but only when a run is about to end by an error.
        if not bool(paddle.isfinite(parameter).all()):
            return name
    return None


class StepScaler(paddle.amp.GradScaler):
    """Scales the loss of one process's run.

    Args:
        scale: the first one, > 0.
        losses: of the steps; reads everything at once.
    """

    _found_inf: paddle.Tensor

    def __init__(self, scale: float, losses: StepLosses) -> None:
        super().__init__(init_loss_scaling=scale)
        self._losses = losses

    def step(self, optimizer: paddle.optimizer.Optimizer) -> None:
        """One step of the optimiser, or none where a gradient overflowed.

        Raises:
            UserError: a loss is NaN or infinite, or a gradient is so at the smallest scale.
        """
        if not self._enable:
            optimizer.step()
            return
        # Gradients are divided by the scale first, so that the norm is that of the true gradient.
        self._unscale(optimizer)
        clip: Any = optimizer._grad_clip
        measures = isinstance(clip, MeasuredNorm)
        parts = optimizer._parameter_list
        gradients = _master_gradients(parts) or [part.grad for part in parts if part.grad is not None]
        # No weight changes before this read has found everything finite.
        norm = clip.measure(gradients) if measures else None
        self._cache_found_inf, value = self._losses.overflows(self._found_inf, norm)
        if not self._cache_found_inf:
            if norm is not None and value is not None:
                clip.use(norm, value)
            optimizer.step()
        # Paddle would halve the scale for ever and skip every step.
        elif float(self._scale) <= _SMALLEST_SCALE:
            raise self._losses.no_scale_left(float(self._scale))
        self._optimizer_states[id(optimizer)]["state"] = OptimizerState.STEPPED

    def _unscale(self, optimizer: paddle.optimizer.Optimizer) -> None:
        """Paddle's, and the same for the float32 gradients of `amp_master_grad`, which it does not look at."""
        super()._unscale(optimizer)
        masters = _master_gradients(optimizer._parameter_list)
        if masters:
            _legacy_C_ops.check_finite_and_unscale(masters, self._scale, masters, self._temp_found_inf_fp32)
            self._found_inf = _C_ops.bitwise_or(self._found_inf, self._temp_found_inf_fp32)


def _master_gradients(parts: list[paddle.Tensor]) -> list[paddle.Tensor]:
    """Float32 gradients that Paddle's mixed precision keeps beside weights; none without `amp_master_grad`."""
    found = (getattr(part, "main_grad", None) for part in parts)
    return [gradient for gradient in found if gradient is not None]
