"""The gradient's norm: Paddle's bits with one process, the same number in every layout, free of the loss scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
import pytest
from paddle import nn

from paddlemix.errors import UserError
from paddlemix.parallel.layout import Layout, Stage
from paddlemix.trainer.steps.clipping import MeasuredNorm, sum_of_squares
from paddlemix.trainer.steps.loss_scale import StepScaler
from paddlemix.trainer.steps.step_losses import StepLosses


def layer_with_gradients(scale: float) -> nn.Layer:
    paddle.seed(0)
    layer = nn.Linear(5, 4)
    (layer(paddle.ones([3, 5])).square().sum() * scale).backward()
    return layer


@pytest.mark.parametrize("scale", [1e-4, 10.0])
def test_clipping_is_paddles_bit_for_bit_and_keeps_the_norm(scale: float) -> None:
    found = []
    clips: list[Any] = [nn.ClipGradByGlobalNorm(0.5), MeasuredNorm(0.5)]
    for clip in clips:
        layer = layer_with_gradients(scale)
        gradients = [parameter.grad.numpy() for parameter in layer.parameters()]
        optimizer = paddle.optimizer.SGD(0.1, parameters=layer.parameters(), grad_clip=clip)
        optimizer.step()
        found.append([parameter.numpy().tobytes() for parameter in layer.parameters()])
    assert found[0] == found[1]
    wanted = np.sqrt(sum((gradient.astype("float64") ** 2).sum() for gradient in gradients))
    assert clip.take() == pytest.approx(wanted, rel=1e-6)
    assert clip.take() is None  # of that step, once


def test_without_a_limit_the_norm_is_measured_and_nothing_clipped() -> None:
    found = []
    measured = MeasuredNorm(None)
    for clip in (None, measured):
        layer = layer_with_gradients(10.0)
        paddle.optimizer.SGD(0.1, parameters=layer.parameters(), grad_clip=clip).step()
        found.append([parameter.numpy().tobytes() for parameter in layer.parameters()])
    assert found[0] == found[1]
    norm = measured.take()
    assert norm is not None and norm > 1


def test_fleet_does_not_put_its_own_in_its_place() -> None:
    """It looks for this class, and its own reports nothing."""
    assert not isinstance(MeasuredNorm(1.0), nn.ClipGradByGlobalNorm)


def test_squares_of_narrow_gradients_are_summed_in_float32() -> None:
    """Their sum, 1.44 million, is infinite in float16."""
    total = sum_of_squares([paddle.full([4, 4], 300.0, dtype="float16")])
    assert total is not None and float(total) == pytest.approx(1.44e6)


@pytest.mark.parametrize(("stage", "wanted"), [("", 5.0), ("stage1", 2**0.5 * 5), ("stage3", (2 * 9 + 16) ** 0.5)])
def test_what_every_process_holds_whole_counts_once(
    monkeypatch: pytest.MonkeyPatch, stage: Stage, wanted: float
) -> None:
    """Two processes that hold the same numbers: of stage1 all are parts, of stage3 only the slice is one."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: tensor.multiply_(paddle.full([], 2.0)))
    layer = nn.Linear(1, 1)
    sliced, small = layer.parameters()
    small.unslice = True
    pairs = [(sliced, paddle.to_tensor([[3.0]])), (small, paddle.to_tensor([4.0]))]
    clip = MeasuredNorm(None, Layout(world_size=2, stage=stage))
    clip(pairs)
    assert clip.take() == pytest.approx(wanted)


# ---- the loss scale ----


def scaled_step(scale: float, gradient: float, losses: StepLosses | None = None) -> tuple[StepScaler, MeasuredNorm]:
    """One step over a weight 1.0 with that gradient, on a machine without the card that Paddle's scaler wants."""
    losses = losses or StepLosses()
    scaler, clip = StepScaler(scale, losses), MeasuredNorm(1.0, losses=losses)
    scaler._enable, scaler._scale, scaler.clip = True, paddle.full([1], scale), clip
    weight = paddle.create_parameter([1], "float32", default_initializer=nn.initializer.Constant(1.0))
    optimizer = paddle.optimizer.SGD(0.5, parameters=[weight], grad_clip=clip)
    (weight * gradient * scale).sum().backward()
    scaler.step(optimizer)
    changed = float(weight) != 1.0
    assert changed == (not clip.left_out) == (not scaler._cache_found_inf)
    return scaler, clip


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_norm_is_free_of_the_loss_scale(scale: float) -> None:
    _, clip = scaled_step(scale, 3.0)
    assert clip.take() == 3.0


def test_a_gradient_that_overflows_costs_its_step_until_no_smaller_scale_is_left() -> None:
    _, clip = scaled_step(2.0, float("inf"))
    assert clip.left_out and clip.take() is None
    with pytest.raises(UserError, match="gradient of step 0 is NaN or infinite at a loss scale of 1"):
        scaled_step(1.0, float("nan"))


def test_a_loss_that_is_no_number_ends_a_scaled_run_at_once() -> None:
    losses = StepLosses()
    losses.add(paddle.full([], float("nan")), 1.0, ["record 5"])
    with pytest.raises(UserError, match="loss of step 0 is nan in the batch of record 5"):
        scaled_step(1024.0, float("nan"), losses)
