"""Loss and right guesses of a model over an evaluation set, which several processes share.

The set is cut into batches as for one process, and those are dealt round, so that any number of processes computes the
same.  Knows no names of metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import paddle

from paddlemix.datasets.batches import BatchMaker, LoadingSettings, RowDataset
from paddlemix.log import logger
from paddlemix.parallel.collectives import agree, gathered_objects
from paddlemix.parallel.layout import Layout
from paddlemix.sample import Skip
from paddlemix.trainer.batches.dataloader import Inputs, batch_inputs

Scores = tuple[paddle.Tensor, paddle.Tensor]  # summed loss and right guesses, scalars on the device


class Between(Protocol):
    """See `Evaluator`."""

    def __call__(self, failure: Exception | None, supervised: int = 0) -> None: ...


def agreed(failure: Exception | None, supervised: int = 0) -> None:
    """A `Between` where no signal can come: an error ends all processes."""
    agree(failure)


@dataclass(frozen=True, kw_only=True)
class EvaluationShare:
    """Which batches a process evaluates.

    Args:
        rank, world_size: of the processes that share the data; batch N is that of process N % world_size.
        batch_size: >= 1.
        max_batches: of all processes together, so that any number of them evaluates the same samples; <= 0 for all.
        host_every: batches after which sums are read from the device; None: at the end of an evaluation.
        passes_alone: whether a pass needs no other process; where weights are shared out it does.
        counts: whether this process's sums count; of those that compute one model together the first's do.
    """

    rank: int
    world_size: int
    batch_size: int
    max_batches: int
    host_every: int | None = None
    passes_alone: bool = True
    counts: bool = True

    @classmethod
    def of(cls, layout: Layout, batch_size: int, max_batches: int, host_every: int | None) -> EvaluationShare:
        """The share of a process of a run; see the class."""
        return cls(
            rank=layout.data_rank,
            world_size=layout.data_size,
            batch_size=batch_size,
            max_batches=max_batches,
            host_every=host_every,
            passes_alone=layout.stage != "stage3" and layout.tensor_degree == 1,
            counts=layout.tensor_rank == 0,
        )

    def batches(self, size: int) -> list[list[int]]:
        """This process's batches of a set of `size` samples; the last of the set may be smaller."""
        return self._all_batches(size)[self.rank :: self.world_size]

    def filling(self, size: int) -> list[list[int]]:
        """Batches to compute besides and not to count: with them every process has equally many."""
        found = self._all_batches(size)
        missing = -len(found) % self.world_size  # in the last round, by the last processes
        return found[:1] if self.rank >= self.world_size - missing else []

    def _all_batches(self, size: int) -> list[list[int]]:
        starts = range(0, size, self.batch_size)[: self.max_batches if self.max_batches > 0 else None]
        return [list(range(start, min(start + self.batch_size, size))) for start in starts]


class Evaluator:
    """Runs a model over evaluation sets.

    Args:
        score: a batch's inputs -> its summed loss and right guesses, computed without gradients.
        loading: how batches are made.
        between: called before each batch, on every process equally often, with the error that this process has met, or
            None, and the batch's supervised tokens; raises on all processes or on none.
    """

    def __init__(
        self,
        score: Callable[[Inputs], Scores],
        loading: LoadingSettings,
        between: Between = agreed,
    ) -> None:
        self._score, self._loading, self._between = score, loading, between
        self._maker: tuple[RowDataset, BatchMaker] | None = None
        self._skipped: set[int] = set()

    def sums(self, dataset: RowDataset, share: EvaluationShare) -> tuple[float, float, int]:
        """Summed loss, right guesses and supervised tokens of the samples of all processes.

        Raises:
            UserError: a sample cannot be used, and none may be left out; on all processes.
            Exception: what `between` raises.
        """
        sums, count = HostSums(share.host_every), 0
        skipped: list[Skip] = []
        counted, filling = share.batches(len(dataset)), share.filling(len(dataset))
        batches = iter(self._maker_of(dataset).batches([*counted, *filling]))
        failure: Exception | None = None
        for number in range(len(counted) + len(filling)):
            batch = None
            try:
                batch = next(batches) if failure is None else None
            except Exception as error:
                failure = error
            self._between(failure, 0 if batch is None else len(batch.loss_index))
            assert batch is not None
            try:
                scores = self._score(batch_inputs(batch))
            except Exception as error:
                if not share.passes_alone:  # the others are in the same pass and wait there
                    raise
                failure = error
                continue
            # Where weights are shared out, a pass needs all processes: one without a batch makes it for the others.
            if number < len(counted):
                sums.add(*scores)
                count += len(batch.loss_index)
                skipped += batch.skipped
        agree(failure)
        # As Python's numbers: float32 would not hold the tokens of a large set.
        own = (*sums.take(), count, skipped)
        shares = [found for found in gathered_objects(own if share.counts else None) if found is not None]
        self._report_skipped(skip for *_, found in shares for skip in found)
        loss, right, counts, _ = zip(*shares, strict=True)
        return sum(loss), sum(right), sum(counts)

    def _maker_of(self, dataset: RowDataset) -> BatchMaker:
        """One for all evaluations of a set: starting worker processes takes seconds."""
        if self._maker is None or self._maker[0] is not dataset:
            self._maker = (dataset, BatchMaker(dataset, self._loading))
        return self._maker[1]

    def _report_skipped(self, skipped: Iterable[Skip]) -> None:
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
