"""What keeps a long run from being lost: it stops where a loss or gradient is no number, on a signal, and early."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import numpy as np
import paddle

from paddlemix.config.schema import RunConfig
from paddlemix.errors import UserError
from paddlemix.log import logger
from paddlemix.trainer.compat import TrainerCallback
from paddlemix.trainer.resuming.saving import best_metric, is_better

# SIGHUP comes when a terminal or a connection closes; systems other than Unix have none.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


class StepLosses:
    """The losses of one optimiser step's micro-batches, and the samples each is of.

    They come from the device once per step, together with the gradient's norm: every look waits until the device is
    done.  Numbers of a report are those of that one look.

    Args:
        broken_weight: asked where a loss is no number: what is to be said where a weight is none already; None where
            all are numbers.

    Attributes:
        waits: whether `check` leaves the look to who knows the gradients, `check_gradient` or `overflows`.
    """

    def __init__(self, broken_weight: Callable[[], str | None] = lambda: None) -> None:
        self.waits = False
        self._broken_weight = broken_weight
        self._losses: list[tuple[paddle.Tensor, float, Sequence[str]]] = []
        self._total = np.float32(0)
        self._step, self._sources = 0, ""  # of the losses that were looked at last

    def add(self, loss: paddle.Tensor, share: float, sources: Sequence[str]) -> None:
        """Takes note of a micro-batch.

        Args:
            loss: summed over its supervised tokens, float32 scalar.
            share: what it is multiplied by in the loss of the step.
        """
        self._losses.append((loss.detach(), share, sources))

    def check(self, step: int) -> None:
        """Looks at the losses before the optimiser uses their gradients, unless a look at these will follow.

        Args:
            step: optimiser steps done.

        Raises:
            UserError: one is NaN or infinite; names the samples.
        """
        self._step = step + 1
        self._sources = "; ".join(source for _, _, sources in self._losses for source in sources)
        if not self.waits:
            self._look()

    def check_gradient(self, norm: paddle.Tensor | None) -> float | None:
        """Looks at the losses and at the gradient's norm over all weights, before the optimiser changes one.

        Args:
            norm: float32 scalar; None where no weight has a gradient.

        Returns:
            The norm.

        Raises:
            UserError: a loss or the norm is NaN or infinite; names the samples.
        """
        if norm is None:
            self._look()
            return None
        [value] = self._look(norm)
        if not math.isfinite(value):
            raise self._no_number("gradient's norm", value, self._sources)
        return value

    def overflows(self, found: paddle.Tensor, norm: paddle.Tensor | None) -> tuple[bool, float | None]:
        """Looks at the losses and at what loss scaling found; a step whose gradients are too large is left out.

        Args:
            found: bool [1], whether a gradient is NaN or infinite.
            norm: see `check_gradient`.

        Returns:
            Whether to leave the step out, and the norm.

        Raises:
            UserError: a loss is NaN or infinite, which no scale mends; names the samples.
        """
        found = found.astype("float32").reshape([])
        values = self._look(found) if norm is None else self._look(found, norm)
        return bool(values[0]), None if norm is None else values[1]

    def no_scale_left(self, scale: float) -> UserError:
        """What is to be said where a gradient is NaN or infinite at the least loss scale that is tried."""
        return self._no_number("gradient", f"NaN or infinite at a loss scale of {scale:g}", self._sources)

    def take_total(self) -> float:
        """Sum of the losses of all steps since the last call, each micro-batch's times its share."""
        self._look()
        total, self._total = float(self._total), np.float32(0)
        return total

    def _look(self, *more: paddle.Tensor) -> list[float]:
        """Brings losses and further float32 scalars to the host in one copy; gives the latter."""
        losses, self._losses = self._losses, []
        if not losses and not more:
            return []
        values = paddle.stack([loss for loss, _, _ in losses] + list(more)).numpy()
        for value, (_, share, sources) in zip(values, losses, strict=False):
            if not math.isfinite(value):
                raise self._no_number("loss", float(value), "; ".join(sources))
            self._total += value * np.float32(share)  # in the order and type that a device would add them
        return [float(value) for value in values[len(losses) :]]

    def _no_number(self, what: str, value: float | str, sources: str) -> UserError:
        found, broken = f"the {what} of step {self._step} is {value}", self._broken_weight()
        if broken is not None:
            return UserError(f"{found}, because {broken}")
        return UserError(
            f"{found} in the batch of {sources}. No weight was changed by it and the last checkpoint is untouched: "
            "look at these samples, lower learning_rate, or set max_grad_norm above 0"
        )


def broken_weight(model: paddle.nn.Layer) -> str | None:
    """The name of the first weight of a model that holds NaN or infinity; None where all numbers are finite."""
    for name, parameter in model.named_parameters():
        if not bool(paddle.isfinite(parameter).all()):
            return name
    return None


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint and ends the run in order on SIGTERM, SIGHUP or Ctrl-C; a second signal ends it at once.

    A signal that the process was started with as ignored stays ignored: a script's background job leaves the
    terminal's Ctrl-C to others.

    Attributes:
        received: the signal that came, None while there was none.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Takes over the signals."""
        try:
            heeded = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._handle) for number in heeded}
        except ValueError:  # not the main thread: whoever runs us there handles signals
            self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.restore()
        logger.warning("%s: saving after this step, then ending (again: end at once)", signal.Signals(number).name)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Asks the loop to save and stop."""
        if self.received is not None:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The run is over."""
        self.restore()

    def restore(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class StopEarly(TrainerCallback):
    """Ends the run when evaluations stop getting better.

    Args:
        config: `early_stopping_patience` evaluations without a gain above `early_stopping_threshold` end the run.
        evaluations: gives the values of the best-model metric so far, those before a resume among them.
    """

    def __init__(self, config: RunConfig, evaluations: Callable[[], Sequence[float]]) -> None:
        self._config, self._evaluations = config, evaluations

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Looks at all evaluations so far."""
        values, patience = self._evaluations(), self._config.early_stopping_patience
        if patience is None or not values:
            return
        best, since = values[0], 0
        for value in values[1:]:
            if is_better(self._config, value, best, self._config.early_stopping_threshold):
                best, since = value, 0
            else:
                since += 1
        if since >= patience:
            metric = best_metric(self._config)
            logger.info("stopping early: %s was not better than %.4f in %d evaluations", metric, best, since)
            control.should_training_stop = True
