"""Shares of an evaluation: together they are what one process evaluates, and all make equally many passes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import paddle
import pytest

from paddlemix.datasets.batches import LoadingSettings
from paddlemix.log import logger
from paddlemix.trainer import evaluator
from paddlemix.trainer.batches.dataloader import Inputs
from paddlemix.trainer.evaluator import EvaluationShare, Evaluator, HostSums, Scores
from tests.rows import NumberedRows


def share(rank: int = 0, world_size: int = 1, batch_size: int = 2, max_batches: int = -1) -> EvaluationShare:
    return EvaluationShare(rank=rank, world_size=world_size, batch_size=batch_size, max_batches=max_batches)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_the_batches_are_those_of_one_process(processes: int) -> None:
    for size, batch_size, most in itertools.product((0, 1, 5, 8, 11), (1, 2, 5), (-1, 0, 1, 3)):
        alone = share(batch_size=batch_size, max_batches=most)
        shares = [share(rank, processes, batch_size, most) for rank in range(processes)]
        found = [item.batches(size) for item in shares]
        dealt = [batch for turn in itertools.zip_longest(*found) for batch in turn if batch is not None]
        assert dealt == alone.batches(size) and not alone.filling(size)
        passes = {len(item.batches(size)) + len(item.filling(size)) for item in shares}
        assert len(passes) == 1, (size, batch_size, most)
    assert share(0, 2, 5, 3).batches(11) == [[0, 1, 2, 3, 4], [10]]


class Scorer:
    """The loss of a batch is the sum of its targets; counts passes."""

    def __init__(self) -> None:
        self.passes = 0

    def __call__(self, inputs: Inputs) -> Scores:
        self.passes += 1
        total = inputs["loss_targets"].sum().astype("float32")
        return total, total / 2


@pytest.mark.parametrize(("size", "processes"), [(11, 2), (11, 3), (2, 3), (0, 2)])
def test_sums_do_not_depend_on_the_number_of_processes(
    size: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = NumberedRows(np.array([5, 0, 3, 9, 2, 0, 7, 4, 0, 6, 1])[:size])
    told, own = list[str](), list[Any]()
    monkeypatch.setattr(logger, "warning", lambda text, reason: told.append(reason))
    whole = Evaluator(Scorer(), LoadingSettings(4)).sums(data, share())
    assert (size == 0) == (whole[2] == 0)
    named = sorted(told)
    assert len(named) == (data.lengths == 0).sum()
    scorers = [Scorer() for _ in range(processes)]
    # The last process, to whom all others have told their shares, sees what every process would.
    monkeypatch.setattr(evaluator, "gathered_objects", lambda value: (own.append(value), own)[1])
    for rank, scorer in enumerate(scorers):
        told.clear()
        found = Evaluator(scorer, LoadingSettings(4)).sums(data, share(rank, processes))
    assert found == whole and sorted(told) == named
    assert len({scorer.passes for scorer in scorers}) == 1


@pytest.mark.parametrize("every", [None, 1, 2, 7])
def test_sums_of_an_evaluation_come_to_the_host_in_portions(every: int | None) -> None:
    sums = HostSums(every)
    for batch in range(5):
        sums.add(paddle.full([], 1.5 * batch), paddle.full([], float(batch)))
        waiting = batch + 1 if every is None else (batch + 1) % every
        assert len(sums.waiting) == waiting
    assert sums.take() == (15.0, 10.0) and not sums.waiting
