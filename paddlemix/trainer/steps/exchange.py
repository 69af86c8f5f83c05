"""What the processes of a run tell each other in every step: one small message, before weights change.

    loss         sum of a process's own losses in the step, each times its share
    gradient     above 0 where its own gradient was no number, see `gradient_watch`
    stop         number of the signal that it received, 0 for none
    failed       1 where something between two steps failed on it, such as writing to the log
    supervised   supervised tokens of its next step, the divisor of the losses to come; -1 where their data failed,
                 -2 where the epoch ends
    positions, tokens, visual    what its batches held since the last message
    skipped      samples that it has left out and the others do not know of; where there are any, all tell which

All read the same table, together with the gradient's norm, so they stop after the same step, know whose loss was not a
number, and end together where one has failed.  A process that fails goes on to the next message: the others wait for
it there.  What is left is an error inside a forward or backward pass: there the others wait in a sum of gradients until
the launcher ends them.

With one process nothing is sent, and errors are raised where they happen.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import paddle

from paddlemix.errors import UserError
from paddlemix.log import logger
from paddlemix.parallel.collectives import agree, gathered, gathered_tensor
from paddlemix.parallel.layout import Layout
from paddlemix.parallel.rendezvous import meet
from paddlemix.trainer.batches.dataloader import DATA_FAILED, BatchLoader, PositionCounts
from paddlemix.trainer.reports.skipped import SkipLog
from paddlemix.trainer.steps.gradient_watch import GradientWatch

_COLUMNS = ("loss", "gradient", "stop", "failed", "supervised", "positions", "tokens", "visual", "skipped")
_EPOCH_ENDS = -2  # in place of a number of tokens


class EvaluationStopped(Exception):
    """A signal ends the run: its evaluation is broken off, on all processes before the same batch."""


class StepExchange:
    """The messages of one process and what the others told.

    Args:
        layout: which process this is.
        loader: of the micro-batches; called when the first is needed.
        skips: the record of samples that are left out; None where nothing is trained.

    Attributes:
        received: the signal that came to this process, None for none.
        watch: of this process's gradient.
        bad_gradients: processes whose own gradient was no number in the last step, as far as is known.
    """

    def __init__(
        self, layout: Callable[[], Layout], loader: Callable[[], BatchLoader], skips: SkipLog | None = None
    ) -> None:
        self._layout, self._loader, self._skips = layout, loader, skips
        self.received: Callable[[], int | None] = lambda: None
        self.watch = GradientWatch()
        self.bad_gradients: list[int] = []
        self._agreed_stop: int | None = None
        self._supervised: np.ndarray | None = None  # [processes], of the next step
        self._failure: Exception | None = None
        self._counts, self._sent, self._earlier_tokens = PositionCounts(), PositionCounts(), 0

    # ---- what is known ----

    @property
    def layout(self) -> Layout:
        """Which process this is."""
        return self._layout()

    @property
    def stop(self) -> int | None:
        """The signal that ends the run, on all processes after the same step; None for none."""
        return self._agreed_stop if self.layout.several else self.received()

    @property
    def counts(self) -> PositionCounts:
        """What the positions of all processes held so far."""
        return self._counts if self.layout.several else self._loader().counts

    @property
    def tokens_seen(self) -> int:
        """Tokens trained on so far by all processes, before a resume too; padding not counted."""
        return self._earlier_tokens + self.counts.tokens

    @tokens_seen.setter
    def tokens_seen(self, earlier: int) -> None:
        self._earlier_tokens = earlier - self.counts.tokens

    # ---- a step ----

    def supervised(self, own: int) -> int:
        """Supervised tokens of all processes in the step that begins.

        Args:
            own: those of this process.

        Raises:
            UserError: another process's data failed; or see `_check_same_samples`.
        """
        if not self.layout.several:
            return own
        counts, self._supervised = self._known(own), None
        if (counts == DATA_FAILED).any():
            agree(None)
        self._check_same_samples(counts)
        return round(self._over_data(counts))

    def data_failed(self, error: Exception) -> NoReturn:
        """Raises `error`, after the other processes have been told where they begin their next step."""
        if self.layout.several:
            self._known(DATA_FAILED)
            agree(error)
        raise error

    def begin(self, loss: paddle.Tensor) -> paddle.Tensor | None:
        """Sends this process's message.

        Args:
            loss: float32 scalar, own sum of the step.

        Returns:
            float32, every message, on the device and not waited for, for `end`; None with one process.
        """
        if not self.layout.several:
            return None
        ahead = self._loader().upcoming
        counts = self._loader().counts
        new, self._sent = counts.since(self._sent), replace(counts)
        values = (
            self.received() or 0,
            self._failure is not None,
            ahead[0] if ahead else _EPOCH_ENDS,
            *(new.positions, new.tokens, new.visual),
            len(self._skips.waiting) if self._skips is not None else 0,
        )
        # Made on the device: a copy from the host would be waited for, with all work that is queued.
        message = [
            loss.reshape([]),
            self.watch.take(),
            *(paddle.full([], float(value), dtype="float32") for value in values),
        ]
        return gathered_tensor(paddle.stack(message)).reshape([-1])

    def end(self, messages: np.ndarray) -> np.ndarray:
        """Takes in what `begin` returned, once it is on the host.

        Returns:
            float32 [processes]: own sums of losses.

        Raises:
            UserError: something failed on another process, which is named; here, its own error.  Or too many samples
                are left out, which all processes find alike.
        """
        table = dict(zip(_COLUMNS, messages.reshape([-1, len(_COLUMNS)]).T, strict=True))
        if table["failed"].any():
            agree(self._failure)
        self.bad_gradients = [int(rank) for rank in np.flatnonzero(table["gradient"])]
        self._take_in_stop(table["stop"])
        self._supervised = None if (table["supervised"] == _EPOCH_ENDS).any() else table["supervised"]
        new = [round(self._over_data(table[name])) for name in ("positions", "tokens", "visual")]
        self._counts.add_counts(PositionCounts(*new))
        if self._skips is not None and table["skipped"].any():
            with self.held():  # only one process writes the file
                self._skips.share()
            self._skips.check()
        return table["loss"]

    # ---- between steps ----

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """An error in this block waits for the next message, so that all processes end by it; with one it is raised."""
        try:
            yield
        except Exception as error:
            if not self.layout.several:
                raise
            # The first counts: later ones often follow from it.
            if self._failure is None:
                logger.error("%s; the other processes are told in the next step", error)
                self._failure = error

    def guard(self, callbacks: Any) -> None:
        """Makes errors of PaddleNLP's `callbacks` wait as in `held`: some write to files, and on one process only."""

        def guarded(event: str, args: Any, state: Any, control: Any, **named: Any) -> Any:
            parts = ("model", "tokenizer", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader")
            values = {name: getattr(callbacks, name) for name in parts} | named
            # Each by itself: some wait for all processes, and must not be left out for an error of another.
            for callback in callbacks.callbacks:
                with self.held():
                    control = getattr(callback, event)(args, state, control, **values) or control
            return control

        callbacks.call_event = guarded

    def between_batches(self, failure: Exception | None, supervised: int = 0) -> None:
        """Before each batch of an evaluation: all processes agree whether an error or a signal ends it.

        Args:
            failure: what this process has met, None for nothing.
            supervised: tokens of its batch.

        Raises:
            UserError: as `end`; or see `_check_same_samples`.
            EvaluationStopped: a signal came to a process.
        """
        if self.layout.several:
            meet()  # the others may still read or compute their batch
            table = gathered([self.received() or 0, failure is not None, supervised])
            if table[:, 1].any():
                agree(failure)
            self._check_same_samples(table[:, 2])
            self._take_in_stop(table[:, 0])
        elif failure is not None:
            raise failure
        if self.stop is not None:
            raise EvaluationStopped

    def settle(self) -> None:
        """After the last step or evaluation: an error that waited for the next message ends all processes.

        Raises:
            UserError: as `end`.
        """
        if self.layout.several:
            agree(self._failure)

    def _take_in_stop(self, numbers: np.ndarray) -> None:
        if self._agreed_stop is None and numbers.any():
            rank = int(np.flatnonzero(numbers)[0])
            self._agreed_stop = int(numbers[rank])
            if self.received() is None:
                name = signal.Signals(self._agreed_stop).name
                logger.warning("%s came to process %d: saving after this step, then ending", name, rank)

    def _known(self, own: int) -> np.ndarray:
        """Supervised tokens of the step that begins, by process; a message of their own where none told them."""
        if self._supervised is None:
            meet()  # a first batch may take long, of a file that is still downloaded
            return gathered([own])[:, 0]
        return self._supervised

    def _check_same_samples(self, supervised: np.ndarray) -> None:
        """Checks that processes that compute one model together have the same samples, before they run a layer.

        Args:
            supervised: tokens of each process.

        Raises:
            UserError: on every process, if one has left out a sample that another has read.
        """
        degree = self.layout.tensor_degree
        groups = supervised.reshape([-1, degree])
        different = np.argwhere(groups != groups[:, :1])
        if len(different):
            group, place = different[0].tolist()
            first, other = group * degree, group * degree + place
            raise UserError(
                f"processes {first} and {other} compute one model together, but have {groups[group, 0]:.0f} and "
                f"{groups[group, place]:.0f} supervised tokens of the same samples: one could not read a picture that "
                "the other has read, see the log of each process; put the data where all nodes read it alike"
            )

    def _over_data(self, values: np.ndarray) -> float:
        """Sum over the processes that read different samples; those that hold parts of one model count once."""
        return float(values.astype(np.float64).sum()) * self.layout.data_size / self.layout.world_size
