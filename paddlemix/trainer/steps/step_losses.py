"""The losses of a step, inspected before the optimiser uses their gradients.

Losses, what other processes tell, gradient norm and overflow are read from the device together, once per step, because
every read waits for all work that is queued there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import paddle

from paddlemix.errors import OtherProcessError, UserError
from paddlemix.parallel.collectives import gathered_objects
from paddlemix.trainer.steps.exchange import StepExchange


class StepLosses:
    """The losses of one optimiser step's micro-batches, and the samples each is of.

    They are read from the device once per step, together with the gradient's norm: every read waits until the device is
    done.  A report shows the numbers of that one read.

    Args:
        broken_weight: called where a loss is NaN or infinite; returns what to report where a weight is so already, None
            where all are finite.
        exchange: with the other processes; None where there are none.

    Attributes:
        all_steps: sum of the losses of all steps.
    """

    def __init__(
        self, broken_weight: Callable[[], str | None] = lambda: None, exchange: StepExchange | None = None
    ) -> None:
        self.all_steps = 0.0
        self._broken_weight, self._exchange = broken_weight, exchange
        self._losses: list[tuple[paddle.Tensor, float, Sequence[str]]] = []
        self._messages: paddle.Tensor | None = None  # of all processes, where there are several
        self._total = np.float32(0)
        self._step, self._sources = 0, ""  # of the losses that were read last

    def add(self, loss: paddle.Tensor, share: float, sources: Sequence[str]) -> None:
        """Keeps a micro-batch's loss for the next read.

        Args:
            loss: summed over its supervised tokens, float32 scalar.
            share: what it is multiplied by in the loss of the step.
        """
        self._losses.append((loss.detach(), share, sources))

    def end_step(self, step: int) -> None:
        """Called when all losses of a step are there: tells the other processes of them.

        Args:
            step: optimiser steps done.
        """
        self._step = step + 1
        self._sources = "; ".join(source for _, _, sources in self._losses for source in sources)
        if self._exchange is not None and self._exchange.layout.several:
            own = [loss.astype("float32") * share for loss, share, _ in self._losses]
            self._messages = self._exchange.begin(sum(own[1:], own[0]))

    def check_gradient(self, norm: paddle.Tensor | None) -> float | None:
        """Checks the losses and the gradient's norm over all weights, before the optimiser changes one.

        Args:
            norm: float32 scalar; None where no weight has a gradient.

        Returns:
            The norm.

        Raises:
            UserError: a loss or the norm is NaN or infinite; names the samples, and the process where there are
                several.
        """
        # A step in which no weight got a gradient: of text alone, where only the projector trains.
        if norm is None:
            self._read()
            return None
        [value] = self._read(norm)
        if not math.isfinite(value):
            raise self._not_finite("gradient's norm", value if self._adds_to_it() else None)
        return value

    def overflows(self, found: paddle.Tensor, norm: paddle.Tensor | None) -> tuple[bool, float | None]:
        """Checks the losses and what loss scaling found; a step whose gradients are too large is left out.

        Args:
            found: one number, above 0 or True where a gradient is NaN or infinite, on any process.
            norm: see `check_gradient`.

        Returns:
            Whether to leave the step out, and the norm.

        Raises:
            UserError: a loss is NaN or infinite, which no scale can mend; names the samples, and the process where
                there are several.
        """
        found = found.astype("float32").reshape([])
        values = self._read(found) if norm is None else self._read(found, norm)
        return bool(values[0]), None if norm is None else values[1]

    def no_scale_left(self, scale: float) -> UserError:
        """The error where a gradient is NaN or infinite at the smallest loss scale that is tried."""
        found = f"NaN or infinite at a loss scale of {scale:g}"
        return self._not_finite("gradient", found if self._adds_to_it() else None)

    def _adds_to_it(self) -> bool:
        """Whether a gradient that is no number may come from this process: where no one is known, from all."""
        known = [] if self._exchange is None else self._exchange.bad_gradients
        return not known or self._exchange is None or self._exchange.layout.rank in known

    def take_total(self) -> float:
        """Sum of the losses of all steps since the last call: of a step the sum over all micro-batches of all
        processes, each times its share of the step."""
        self._read()
        total, self._total = float(self._total), np.float32(0)
        return total

    def _read(self, *more: paddle.Tensor) -> list[float]:
        """Brings losses and further float32 scalars to the host in one copy; returns the latter."""
        losses, self._losses = self._losses, []
        messages, self._messages = self._messages, None
        if not losses and not more:
            return []
        # One copy for everything: each copy of its own would wait for the device again.
        tensors = paddle.stack([loss for loss, _, _ in losses] + list(more))
        if messages is not None:
            values = paddle.concat([tensors, messages]).numpy()
            self._take_in_all(values[: len(losses)], values[len(tensors) :])
        else:
            values = tensors.numpy()
            self._take_in_own(values, losses)
        return [float(value) for value in values[len(losses) : len(tensors)]]

    def _take_in_own(self, values: np.ndarray, losses: Sequence[tuple[paddle.Tensor, float, Sequence[str]]]) -> None:
        for value, (_, share, sources) in zip(values, losses, strict=False):
            if not math.isfinite(value):
                raise self._not_finite("loss", float(value), "; ".join(sources))
            self._total += value * np.float32(share)  # in the order and type that a device would add them

    def _take_in_all(self, own: np.ndarray, messages: np.ndarray) -> None:
        assert self._exchange is not None
        sums = self._exchange.end(messages)
        if np.isfinite(sums).all():
            mean = float(sums.astype(np.float64).mean())  # shares are of the mean over processes, as gradients are
            self._total += np.float32(mean)
            self.all_steps += mean
            return
        bad = None
        if not math.isfinite(sums[self._exchange.layout.rank]):
            bad = next((float(value) for value in own if not math.isfinite(value)), float(sums.max()))
        raise self._not_finite("loss", bad)

    def _not_finite(self, what: str, value: float | str | None, sources: str | None = None) -> UserError:
        """The error on every process alike; where there are several, all of them have come here.

        Args:
            value: of this process; None where only others have a bad one.
            sources: samples of the micro-batch; None for those of the whole step.
        """
        own = None if value is None else (value, self._sources if sources is None else sources)
        reports = gathered_objects((own, self._broken_weight()))
        bad = {rank: report for rank, (report, _) in enumerate(reports) if report is not None}
        found = f"the {what} of step {self._step} is {next(iter(bad.values()))[0]}"
        # A weight that is broken already explains the loss better than the samples do.
        broken = next((weight for _, weight in reports if weight is not None), None)
        kind = UserError if own is not None else OtherProcessError
        if broken is not None:
            return kind(f"{found}, because {broken}")
        if len(reports) == 1:
            of = bad[0][1]
        else:
            degree = self._exchange.layout.tensor_degree if self._exchange is not None else 1
            named = {rank: bad[rank] for rank in first_of_groups(bad, degree)}
            of = " and of ".join(f"process {rank} ({sources})" for rank, (_, sources) in named.items())
        return kind(
            f"{found} in the batch of {of}. No weight was changed by it and the last checkpoint is untouched: "
            "inspect these samples, lower learning_rate, or set max_grad_norm above 0"
        )


def first_of_groups(ranks: Iterable[int], degree: int) -> list[int]:
    """Of the processes that read the same samples, because they compute one model together, the first that is named.

    Args:
        ranks: ascending.
        degree: processes that compute one model.
    """
    firsts: dict[int, int] = {}
    for rank in ranks:
        firsts.setdefault(rank // degree, rank)
    return list(firsts.values())


def broken_weight(model: paddle.nn.Layer) -> str | None:
    """The name of the first weight of a model that holds NaN or infinity; None where all numbers are finite."""
    for name, parameter in model.named_parameters():
        # Of a weight that processes share this one has a slice; the whole is there during its layer alone.
        held = getattr(parameter, "fw_storage", None)
        number = parameter if held is None else held
        # One read per weight, but only when a run is about to end by an error.
        if number._is_initialized() and not bool(paddle.isfinite(number).all()):
            return name
    return None
