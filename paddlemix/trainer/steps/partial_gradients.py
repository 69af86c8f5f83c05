"""Gradients of the weights that every process of a tensor group has whole, made one once for each optimiser step.

    weight                              a process's gradient            is replaced by
    norm inside a block, half of LoRA   of its own heads, inner width   the sum
    tower, projector, newline, norm     whole                           the mean
    embedding, projections, their LoRA  of its part of the weight       nothing: nobody else has it

The mean changes nothing where operators return the same bits everywhere.  On a card some do not, which add up in any
order (backward passes of attention in the tower, of rows that are taken several times); then the weights of the
processes would part, a little more in each step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import paddle
import paddle.distributed as dist

from paddlemix.parallel.layout import Layout
from paddlemix.parallel.tensor.parts import has_partial_gradient, part_of

Pair = tuple[paddle.Tensor, paddle.Tensor]  # parameter and gradient
_AT_ONCE = 2**25  # numbers of one message; float32, so 128 MiB


def join_gradients(pairs: Sequence[Pair], layout: Layout) -> None:
    """Makes the gradients of weights that nobody splits the same on every process of the tensor group, in place.

    Args:
        pairs: (parameter, gradient), of the same parameters in the same order on every process of the group.
        layout: of the run; without a tensor group nothing is done.
    """
    if layout.tensor_degree == 1:
        return
    shared = [(parameter, gradient) for parameter, gradient in pairs if part_of(parameter) is None]
    for message in _messages(shared):
        # In float32, as the gradient of one process is added up inside its operators.
        flat = paddle.concat([_summand(parameter, gradient, layout) for parameter, gradient in message])
        dist.all_reduce(flat, group=layout.tensor_group)
        joined = paddle.split(flat, [gradient.size for _, gradient in message])
        for (_, gradient), whole in zip(message, joined, strict=True):
            paddle.assign(whole.reshape(gradient.shape).astype(gradient.dtype), gradient)


def _summand(parameter: paddle.Tensor, gradient: paddle.Tensor, layout: Layout) -> paddle.Tensor:
    """What a process adds to a gradient, float32 [n]."""
    own = gradient.reshape([-1]).astype("float32")
    return own if has_partial_gradient(parameter) else own * (1.0 / layout.tensor_degree)


def _messages(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """Pairs in groups that are sent together; a large gradient is a group of its own."""
    waiting: list[Pair] = []
    size = 0
    for pair in pairs:
        gradient = pair[1]
        if waiting and size + gradient.size > _AT_ONCE:
            yield waiting
            waiting, size = [], 0
        waiting.append(pair)
        size += gradient.size
    if waiting:
        yield waiting
