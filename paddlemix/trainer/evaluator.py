"""Loss and right guesses of a model over one process's share of an evaluation set.

It knows neither names of metrics nor other processes: the Trainer adds the shares up and reports them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import paddle

from paddlemix.datasets.batches import BatchMaker, LoadingSettings, RowDataset
from paddlemix.log import logger
from paddlemix.sample import Skip
from paddlemix.trainer.batches.dataloader import Inputs, batch_inputs

Scores = tuple[paddle.Tensor, paddle.Tensor]  # summed loss and right guesses, scalars on the device


@dataclass(frozen=True, kw_only=True)
class EvaluationShare:
    """Which batches a process evaluates.

    Args:
        rank, world_size: of the processes that share the data; sample N is that of process N % world_size.
        batch_size: >= 1.
        max_batches: of this process; <= 0 for all.
        host_every: batches after which sums are read from the device; None: at the end of an evaluation.
    """

    rank: int
    world_size: int
    batch_size: int
    max_batches: int
    host_every: int | None


class Evaluator:
    """Runs a model over evaluation sets.

    Args:
        score: a batch's inputs -> its summed loss and right guesses, computed without gradients.
        loading: how batches are made.
    """

    def __init__(self, score: Callable[[Inputs], Scores], loading: LoadingSettings) -> None:
        self._score, self._loading = score, loading
        self._maker: tuple[RowDataset, BatchMaker] | None = None
        self._skipped: set[int] = set()

    def sums(self, dataset: RowDataset, share: EvaluationShare) -> tuple[float, float, int]:
        """Summed loss, right guesses and supervised tokens of this process's samples."""
        rows = list(range(share.rank, len(dataset), share.world_size))
        batches = [rows[start : start + share.batch_size] for start in range(0, len(rows), share.batch_size)]
        if share.max_batches > 0:
            batches = batches[: share.max_batches]
        sums, count = HostSums(share.host_every), 0
        for batch in self._maker_of(dataset).batches(batches):
            self._report_skipped(batch.skipped)
            sums.add(*self._score(batch_inputs(batch)))
            count += len(batch.loss_index)
        return *sums.take(), count

    def _maker_of(self, dataset: RowDataset) -> BatchMaker:
        """One for all evaluations of a set: starting worker processes takes seconds."""
        if self._maker is None or self._maker[0] is not dataset:
            self._maker = (dataset, BatchMaker(dataset, self._loading))
        return self._maker[1]

    def _report_skipped(self, skipped: Sequence[Skip]) -> None:
        """Names the samples that are left out, each once."""
        for skip in skipped:
            if skip.index not in self._skipped:
                self._skipped.add(skip.index)
                logger.warning("left out of every evaluation: %s", skip.reason)


class HostSums:
    """Sums of loss and right guesses over batches, read from the device together, because each read waits for it.

    Args:
        every: batches after which they are read at the latest; None: at the end of an evaluation.

    Attributes:
        waiting: float32 scalars of batches that are still on the device.
    """

    def __init__(self, every: int | None) -> None:
        self._every, self._totals = every, [0.0, 0.0]
        self.waiting: list[tuple[paddle.Tensor, paddle.Tensor]] = []

    def add(self, loss_sum: paddle.Tensor, right: paddle.Tensor) -> None:
        """Adds a batch's float32 scalars."""
        self.waiting.append((loss_sum, right))
        if len(self.waiting) == self._every:
            self.take()

    def take(self) -> tuple[float, float]:
        """Both sums over all batches so far."""
        if self.waiting:
            for number, values in enumerate(zip(*self.waiting, strict=True)):
                # Added in Python floats: float32 would lose the small ones of a long evaluation.
                self._totals[number] += sum(paddle.stack(list(values)).tolist())
            self.waiting = []
        return self._totals[0], self._totals[1]
