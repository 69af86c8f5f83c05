"""Where the processes of a tensor group meet: at the entrance and the exit of each block that they share.

            forward                       backward
    enter   the input as it is            gradients of all processes are added
    leave   outputs of all are added      the gradient as it is

Source: Shoeybi et al. 2019, "Megatron-LM", figure 3 (f and g).
"""

from __future__ import annotations

from typing import Any

import paddle
import paddle.distributed as dist
from paddle.autograd import PyLayer

from paddlemix.parallel.layout import Layout
from paddlemix.parallel.tensor.split_plan import extent


def enter(states: paddle.Tensor, layout: Layout) -> paddle.Tensor:
    """The same numbers; their gradient is the sum of those of all processes of the tensor group."""
    return states if states.stop_gradient or not paddle.is_grad_enabled() else _Enter.apply(states, layout)


def leave(states: paddle.Tensor, layout: Layout) -> paddle.Tensor:
    """The sum of the tensors of all processes of the tensor group."""
    return _Leave.apply(states, layout)


class _Enter(PyLayer):
    @staticmethod
    def forward(ctx: Any, states: paddle.Tensor, layout: Layout) -> paddle.Tensor:
        ctx.layout = layout
        return paddle.assign(states)

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> paddle.Tensor:
        return summed(grad, ctx.layout)


class _Leave(PyLayer):
    @staticmethod
    def forward(ctx: Any, states: paddle.Tensor, layout: Layout) -> paddle.Tensor:
        return summed(paddle.assign(states), layout)

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> paddle.Tensor:
        return grad


def summed(tensor: paddle.Tensor, layout: Layout) -> paddle.Tensor:
    """The sum over the tensor group, in place where the tensor is contiguous."""
    tensor = tensor.contiguous()
    dist.all_reduce(tensor, group=layout.tensor_group)
    return tensor


def joined(local: paddle.Tensor, size: int, layout: Layout) -> paddle.Tensor:
    """Parts along the last axis, put together on every process; for tensors without a gradient.

    Args:
        local: [..., own part]; parts may be of several widths, by `split_plan.extent`.
        size: of the whole axis.

    Returns:
        [..., size].
    """
    degree = layout.tensor_degree
    widths = [stop - start for start, stop in (extent(size, degree, rank) for rank in range(degree))]
    missing = max(widths) - local.shape[-1]
    if missing:  # collectives need equal shapes
        local = paddle.concat([local, paddle.zeros([*local.shape[:-1], missing], dtype=local.dtype)], axis=-1)
    parts: list[paddle.Tensor] = []
    dist.all_gather(parts, local.contiguous(), group=layout.tensor_group)
    return paddle.concat([part[..., :width] for part, width in zip(parts, widths, strict=True)], axis=-1)
