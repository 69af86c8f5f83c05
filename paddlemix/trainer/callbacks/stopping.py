"""Reasons to stop between two steps, with everything saved: a signal, and evaluations that no longer improve."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from paddlemix.config.schema import RunConfig
from paddlemix.errors import Stopped
from paddlemix.launch.events import SAME_SIGNAL
from paddlemix.log import logger
from paddlemix.trainer.paddlenlp_trainer import TrainerCallback
from paddlemix.trainer.resuming.best_checkpoint import best_metric, is_better, note_best

# SIGHUP comes when a terminal or a connection closes; systems other than Unix have none.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint and ends the run in order on SIGTERM, SIGHUP or Ctrl-C; a later signal ends it at once.

    Repeats within five seconds are the same signal: Paddle's launcher sends SIGTERM three times, 0.2 seconds apart.  A
    signal that the process was started with as ignored stays ignored: a background job of a script is not ended by the
    terminal's Ctrl-C.

    Args:
        clock: seconds, from any beginning.

    Attributes:
        received: the signal that came to this process, None while there was none.
        decided: returns the signal that ends the run, None for none; of several processes all know the same.
        ended_by: the signal that a checkpoint was saved for, None for none.  One that comes later, when all steps are
            done, waits for the result.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.received: int | None = None
        self.decided: Callable[[], int | None] = lambda: self.received
        self.ended_by: int | None = None
        self._next = "saving after this step"
        self._clock, self._since = clock, 0.0
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Takes over the signals."""
        try:
            # Read before ours are set, so that `restore` can put them back.
            heeded = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._handle) for number in heeded}
        except ValueError:  # not the main thread: whoever runs us there handles signals
            self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A handler may run between any two instructions, so it only notes the signal; the step's end acts on it.
        name, now = signal.Signals(number).name, self._clock()
        if self.received is None:
            self.received, self._since = number, now
            logger.warning("%s: %s, then ending (again after %d s: end at once)", name, self._next, SAME_SIGNAL)
        elif now - self._since > SAME_SIGNAL:
            self.restore()
            logger.warning("%s again: ending at once", name)
            signal.raise_signal(number)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Asks the loop to save and stop."""
        if self.decided() is not None:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The loop comes here from the middle of an epoch too, where no evaluation of an epoch is due."""
        if self.decided() is not None and state.epoch % 1:
            control.should_evaluate = False

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A checkpoint was saved."""
        self.ended_by = self.decided()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """All steps are done."""
        self._next = "writing the result"

    def check_ended(self) -> None:
        """Raises Stopped where a signal has ended the run before its last step, with a checkpoint."""
        if self.ended_by is not None:
            raise Stopped(self.ended_by)

    def check_received(self) -> None:
        """Raises Stopped where a signal came to this process at any time."""
        if self.received is not None:
            raise Stopped(self.received)

    def restore(self) -> None:
        """Puts back the handlers that were there before; to be called when the result is written."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class CatchUp(TrainerCallback):
    """Begins a resumed run with the evaluation that a signal had broken off when its checkpoint was saved.

    Args:
        trainer: the run's.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called when the checkpoint has been read."""
        trainer = self._trainer
        if trainer.evaluation_due:
            trainer.evaluation_due = False
            checkpoint = Path(trainer.config.output_dir) / f"checkpoint-{state.global_step}"
            note_best(trainer, trainer.evaluate(), checkpoint)
            if trainer.evaluation_due:  # broken off again: the checkpoint still says so
                raise Stopped(trainer.exchange.stop)


class StopEarly(TrainerCallback):
    """Ends the run when evaluations no longer improve.

    Args:
        config: `early_stopping_patience` evaluations without a gain above `early_stopping_threshold` end the run.
        evaluations: returns the values of the best-model metric so far, those before a resume among them.
    """

    def __init__(self, config: RunConfig, evaluations: Callable[[], Sequence[float]]) -> None:
        self._config, self._evaluations = config, evaluations

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Compares all evaluations so far."""
        values, patience = self._evaluations(), self._config.early_stopping_patience
        if patience is None or not values:
            return
        # Counted again from all evaluations: a resumed run comes to the same decision.
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
