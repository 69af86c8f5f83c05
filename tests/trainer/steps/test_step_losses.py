"""A step's losses, its norm and its overflow: read once, told once, refused where one is no number."""

from __future__ import annotations

import paddle
import pytest

from paddlemix.errors import UserError
from paddlemix.trainer.steps.step_losses import StepLosses, first_of_groups


def test_losses_and_norm_come_together() -> None:
    losses = StepLosses()
    for value, share in ((3.0, 0.5), (8.0, 0.25)):
        losses.add(paddle.full([], value), share, [f"record {value:.0f}"])
    losses.end_step(0)
    assert losses.check_gradient(paddle.full([], 7.0)) == 7.0
    assert losses.take_total() == 3.5
    assert losses.take_total() == 0.0
    losses.add(paddle.full([], 2.0), 1.0, ["record 9"])
    losses.end_step(1)
    assert losses.overflows(paddle.to_tensor([True]), paddle.full([], float("inf"))) == (True, float("inf"))
    assert losses.take_total() == 2.0  # the loss of a step that is left out is told
    assert losses.overflows(paddle.to_tensor([False]), paddle.full([], 2.5)) == (False, 2.5)
    assert losses.overflows(paddle.to_tensor([True]), None) == (True, None)


def test_a_bad_loss_is_found_where_no_norm_follows() -> None:
    losses = StepLosses()
    losses.add(paddle.full([], 1.0), 1.0, ["record 1"])
    losses.add(paddle.full([], float("inf")), 1.0, ["record 2"])
    losses.end_step(4)
    with pytest.raises(UserError, match=r"the loss of step 5 is inf in the batch of record 2\."):
        losses.check_gradient(None)


def test_processes_that_compute_one_model_are_named_once() -> None:
    assert first_of_groups([0, 1, 3, 6, 7], 2) == [0, 3, 6]
    assert first_of_groups([1, 2], 1) == [1, 2]
