"""What keeps a long run from being lost: it stops where a loss or gradient is no number, on a signal, and early."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import paddle

from paddlemix.config.schema import RunConfig
from paddlemix.errors import UserError
from paddlemix.log import logger
from paddlemix.trainer.compat import TrainerCallback
from paddlemix.trainer.saving import best_metric, is_better

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StepLosses:
    """The losses of one optimiser step's micro-batches, and the samples each is of.

    They are looked at once per step, so that nothing waits for a device in between.
    """

    def __init__(self) -> None:
        self._losses: list[tuple[paddle.Tensor, Sequence[str]]] = []
        self._step, self._sources = 0, ""  # of the losses that were looked at last

    def add(self, loss: paddle.Tensor, sources: Sequence[str]) -> None:
        """Takes note of a micro-batch."""
        self._losses.append((loss.detach(), sources))

    def check(self, step: int) -> None:
        """Looks at the losses before the optimiser uses their gradients, and forgets them.

        Args:
            step: optimiser steps done.

        Raises:
            UserError: one is NaN or infinite; names the samples.
        """
        losses, self._losses = self._losses, []
        self._step, self._sources = step + 1, "; ".join(source for _, sources in losses for source in sources)
        for loss, sources in losses:
            if not math.isfinite(float(loss)):
                raise UserError(_no_number("loss", self._step, float(loss), "; ".join(sources)))

    def check_gradient(self, norm: paddle.Tensor) -> None:
        """Looks at the gradient's norm over all weights, before the optimiser changes one.

        Raises:
            UserError: it is NaN or infinite; names the samples of the step.
        """
        if not math.isfinite(float(norm)):
            raise UserError(_no_number("gradient's norm", self._step, float(norm), self._sources))


def _no_number(what: str, step: int, value: float, sources: str) -> str:
    return (
        f"the {what} of step {step} is {value} in the batch of {sources}. No weight was changed by it and the last "
        "checkpoint is untouched: look at these samples, lower learning_rate, or set max_grad_norm above 0"
    )


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint and ends the run in order on SIGTERM or Ctrl-C; a second signal ends it at once.

    Attributes:
        received: the signal that came, None while there was none.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Takes over the signals."""
        try:
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
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
