"""Gradients in a tensor group: shares are added up, whole ones averaged; in the norm parts count where they are, whole
ones once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
import pytest
from paddle import nn

from paddlemix.parallel.layout import Layout, Stage
from paddlemix.parallel.tensor.parts import Part, mark, mark_partial
from paddlemix.parallel.tensor.training import dealt
from paddlemix.trainer.steps import partial_gradients
from paddlemix.trainer.steps.clipping import MeasuredNorm


@dataclass(frozen=True)
class Group:
    """Stands for a group of processes that all have the same numbers."""

    nranks: int
    rank: int = 0


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of all sums over the groups; each is that of one process times the group's processes."""
    sizes: list[int] = []

    def all_reduce(tensor: Any, group: Group) -> None:
        sizes.append(int(tensor.size))
        tensor.multiply_(paddle.full([], float(group.nranks), dtype=tensor.dtype))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return sizes


def parameters() -> list[Any]:
    """A part of a weight, a norm whose gradient is a share, a weight that is whole everywhere."""
    part, norm, whole = (nn.Linear(2, 3, bias_attr=False).weight for _ in range(3))
    mark(part, Part(axis=0, start=0, stop=2, size=4))
    mark_partial(norm)
    return [part, norm, whole]


def tensor_layout(stage: Stage = "") -> Layout:
    return Layout(world_size=4, stage=stage, tensor_group=Group(2), sharding_group=Group(2) if stage else None)


# Of three gradients of six ones: the part twice, the norm's of twos, the whole once; other weights in other processes.
@pytest.mark.parametrize(("stage", "wanted"), [("", 42.0), ("stage1", 84.0), ("stage2", 84.0)])
def test_the_norm_is_that_of_one_process(messages: list[int], stage: Stage, wanted: float) -> None:
    gradients = [paddle.ones([2, 3]) for _ in range(3)]
    clip = MeasuredNorm(0.5, tensor_layout(stage))
    clip(list(zip(parameters(), gradients, strict=True)))
    assert clip.take() == pytest.approx(wanted**0.5, rel=1e-6)
    factor = 0.5 / wanted**0.5
    for gradient, value in zip(gradients, (1.0, 2.0, 1.0), strict=True):
        np.testing.assert_allclose(gradient.numpy(), factor * value, rtol=1e-6)
    assert messages[0] == 12 and len(messages) == (3 if stage else 2)


def test_an_overflow_on_another_process_leaves_the_step_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_reduce(tensor: Any, group: Group) -> None:
        if tensor.size == 2:  # squares and overflow: the other process found one
            tensor.add_(paddle.to_tensor([0.0, 1.0]))

    class Losses:
        found = 0.0

        def overflows(self, found: Any, norm: Any) -> tuple[bool, float]:
            self.found = float(found)
            return bool(self.found), 1.0

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    losses: Any = Losses()
    clip = MeasuredNorm(1.0, tensor_layout(), losses)
    clip.scale = paddle.ones([1])
    assert clip([(parameters()[0], paddle.ones([2, 3]))]) == []
    assert clip.left_out and losses.found == 1.0


def test_types_and_messages(messages: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow gradients stay narrow; many numbers are sent in several messages, none of them twice."""
    monkeypatch.setattr(partial_gradients, "_AT_ONCE", 13)
    pairs = [(parameters()[1], paddle.full([2, 3], 3.0, dtype="bfloat16")) for _ in range(5)]
    partial_gradients.join_gradients(pairs, tensor_layout())
    assert all(gradient.dtype == paddle.bfloat16 and (gradient == 6.0).all() for _, gradient in pairs)
    assert messages == [12, 12, 6]
    with_one = (parameters()[1], paddle.ones([2, 3]))
    partial_gradients.join_gradients([with_one], Layout())
    assert (with_one[1] == 1.0).all()


def test_whole_gradients_are_the_mean_of_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that adds up in any order returns other last bits on the other process."""
    mine, others = np.float32(0.1), np.nextafter(np.float32(0.1), np.float32(1))
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: tensor.add_(paddle.full_like(tensor, others / 2)))
    part, _, whole = parameters()
    pairs = [(part, paddle.full([2, 3], mine)), (whole, paddle.full([2, 3], mine))]
    partial_gradients.join_gradients(pairs, tensor_layout())
    np.testing.assert_array_equal(pairs[0][1].numpy(), mine)
    np.testing.assert_array_equal(pairs[1][1].numpy(), mine / 2 + others / 2)


def test_which_replica_updates_a_weight_does_not_depend_on_the_part() -> None:
    """Parts of 16, 8 and 9 numbers, on the other process 14, 10 and 9: the whole ones decide, on both alike."""
    found = []
    for rows in ((8, 4), (7, 5)):
        weights = [paddle.create_parameter([size, 2], "float32") for size in rows] + [
            paddle.create_parameter([9, 1], "float32")
        ]
        mark(weights[0], Part(axis=0, start=0, stop=rows[0], size=15))
        mark(weights[1], Part(axis=0, start=0, stop=rows[1], size=9))
        numbers = {weight.name: number for number, weight in enumerate(weights)}
        found.append([[numbers[weight.name] for weight in share] for share in dealt(weights, 2)])
    assert found[0] == found[1] == [[0], [1, 2]]
