"""Gradients of which each process of a tensor group has a share, added up once for each optimiser step.

A norm inside a block is whole in every process, but each computes the gradient of its own heads or inner width alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import paddle
import paddle.distributed as dist

from paddlemix.parallel.layout import Layout
from paddlemix.parallel.tensor.parts import has_partial_gradient

_AT_ONCE = 2**25  # numbers of one message; float32, so 128 MiB


def sum_partial_gradients(pairs: Sequence[tuple[paddle.Tensor, paddle.Tensor]], layout: Layout) -> None:
    """Adds partial gradients up over the tensor group, in place.

    Args:
        pairs: (parameter, gradient), of the same parameters in the same order on every process of the group.
        layout: of the run; without a tensor group nothing is done.
    """
    if layout.tensor_degree == 1:
        return
    partial = [gradient for parameter, gradient in pairs if has_partial_gradient(parameter)]
    for gradients in _messages(partial):
        # In float32, as the gradient of one process is added up inside its operators.
        flat = paddle.concat([gradient.reshape([-1]).astype("float32") for gradient in gradients])
        dist.all_reduce(flat, group=layout.tensor_group)
        parts = paddle.split(flat, [gradient.size for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            paddle.assign(part.reshape(gradient.shape).astype(gradient.dtype), gradient)


def _messages(gradients: Sequence[paddle.Tensor]) -> Iterator[list[paddle.Tensor]]:
    """The gradients in groups that are sent together; a large one is a group of its own."""
    waiting: list[paddle.Tensor] = []
    size = 0
    for gradient in gradients:
        if waiting and size + gradient.size > _AT_ONCE:
            yield waiting
            waiting, size = [], 0
        waiting.append(gradient)
        size += gradient.size
    if waiting:
        yield waiting
