"""Linear layers with their forward and backward pass written out, by the rules of functions.py.

Together with the pass before them, so that training does not keep the tensor in between; or with a low-rank update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import paddle
from paddle.autograd import PyLayer

from paddlemix.models.kernels import cpu
from paddlemix.models.kernels.functions import as_type, autocasts, only, trains
from paddlemix.models.kernels.operators import Dropping, dropout_mask, widened_mask

NARROW_COST = 3  # a product with a factor of few columns runs at about a third of the rate


class NormedLinearsFunction(PyLayer):
    """n(x) W for several W, where n(x) = x / sqrt(mean(x^2) + epsilon) * weight."""

    @staticmethod
    def forward(
        ctx: Any, inputs: paddle.Tensor, weight: paddle.Tensor, epsilon: float, *matrices: paddle.Tensor
    ) -> tuple[paddle.Tensor, ...]:
        """[..., in], [in] and [in, out] each -> [..., out] each."""
        normed, scales = cpu.rms_norm(inputs, weight, epsilon)
        ctx.epsilon, ctx.trains = epsilon, trains(inputs, weight, *matrices)
        ctx.save_for_backward(inputs, scales, weight, *matrices)
        return tuple(paddle.matmul(normed, matrix) for matrix in matrices)

    @staticmethod
    def backward(ctx: Any, *grads: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        """Gradients of inputs, norm weight and matrices."""
        inputs, scales, weight, *matrices = ctx.saved_tensor()
        matrix_grads = _weight_grads(lambda: cpu.rms_norm(inputs, weight, ctx.epsilon)[0], grads, wanted=ctx.trains[2:])
        if not any(ctx.trains[:2]):
            return None, None, *matrix_grads
        # all linear layers read the same norm, so their gradients add up before it is passed once
        normed_grad = paddle.matmul(grads[0], matrices[0], transpose_y=True)
        for grad, matrix in zip(grads[1:], matrices[1:], strict=True):
            normed_grad.add_(paddle.matmul(grad, matrix, transpose_y=True))
        found = cpu.rms_norm_backward(normed_grad, inputs, weight, scales, ctx.trains[1])
        return *only(ctx.trains[:2], *found), *matrix_grads


class GatedLinearFunction(PyLayer):
    """(silu(gate) * up) W."""

    @staticmethod
    def forward(ctx: Any, gate: paddle.Tensor, up: paddle.Tensor, matrix: paddle.Tensor) -> paddle.Tensor:
        """Twice [..., in] and [in, out] -> [..., out]."""
        ctx.trains = trains(gate, up, matrix)
        ctx.save_for_backward(gate, up, matrix)
        return paddle.matmul(cpu.gated(gate, up), matrix)

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        """Gradients of gate, up and the matrix."""
        gate, up, matrix = ctx.saved_tensor()
        matrix_grads = _weight_grads(lambda: cpu.gated(gate, up), [grad], wanted=ctx.trains[2:])
        if not any(ctx.trains[:2]):
            return None, None, *matrix_grads
        found = cpu.gated_backward(paddle.matmul(grad, matrix, transpose_y=True), gate, up)
        return *only(ctx.trains[:2], *found), *matrix_grads


def _weight_grads(
    make_inputs: Callable[[], paddle.Tensor], grads: Sequence[paddle.Tensor], wanted: Sequence[bool]
) -> list[paddle.Tensor | None]:
    """inputs^T grad for each matrix that trains; the inputs are made only where there is one."""
    if not any(wanted):
        return [None] * len(wanted)
    # one product over all rows: [..., in] -> [rows, in]
    inputs = make_inputs()
    flat = inputs.reshape([-1, inputs.shape[-1]])
    return [
        paddle.matmul(flat, grad.reshape([-1, grad.shape[-1]]), transpose_x=True) if want else None
        for grad, want in zip(grads, wanted, strict=True)
    ]


class LowRankLinearFunction(PyLayer):
    """x (W + scaling A B), as one product forward and one back to x.

    For float32 alone: in other types the sum would lose the last bits of the update.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: paddle.Tensor,
        weight: paddle.Tensor,
        first: paddle.Tensor,
        second: paddle.Tensor,
        scaling: float,
    ) -> paddle.Tensor:
        """[..., in], [in, out], [in, r], [r, out] -> [..., out]."""
        ctx.save_for_backward(inputs, weight, first, second)
        ctx.scaling, ctx.trains = scaling, trains(inputs, weight, first, second)
        # the sum of weight and update is made again in the backward pass, instead of being kept for every layer
        return paddle.matmul(inputs, paddle.matmul(first * scaling, second).add_(weight))

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        """Gradients of inputs, weight and the update's two factors."""
        inputs, weight, first, second = ctx.saved_tensor()
        inputs_grad = weight_grad = None
        if ctx.trains[0]:
            total = paddle.matmul(first * ctx.scaling, second).add_(weight)
            inputs_grad = paddle.matmul(grad, total, transpose_y=True)
        (rank, out_size), in_size = second.shape, first.shape[0]
        flat, grad = inputs.reshape([-1, in_size]), grad.reshape([-1, out_size])
        # Either the gradient of the whole update [in, out] once, or two products through the narrow middle [rows, r]:
        # the first if the weight trains anyway, or the rank is so large that narrow products cost more.
        if ctx.trains[1] or in_size * out_size <= 2 * NARROW_COST * rank * (in_size + out_size):
            weight_grad = paddle.matmul(flat, grad, transpose_x=True)
            first_grad = paddle.matmul(weight_grad, second * ctx.scaling, transpose_y=True)
            second_grad = paddle.matmul(first * ctx.scaling, weight_grad, transpose_x=True)
        else:
            narrow = paddle.matmul(grad, second * ctx.scaling, transpose_y=True)  # [rows, r]
            first_grad = paddle.matmul(narrow, flat, transpose_x=True).transpose([1, 0])  # wide rows are the fast side
            second_grad = paddle.matmul(paddle.matmul(flat, first * ctx.scaling), grad, transpose_x=True)
        return only(ctx.trains, inputs_grad, weight_grad, first_grad, second_grad)


class DroppedLowRankFunction(PyLayer):
    """scaling * dropout(x) A B.  Keeps one byte for each number of x, where automatic gradients keep dropout(x) too."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: paddle.Tensor,
        first: paddle.Tensor,
        second: paddle.Tensor,
        scaling: float,
        dropping: Dropping,
    ) -> paddle.Tensor:
        """[..., in], [in, r], [r, out] -> [..., out].

        Products run in the type that autocast chooses, else in that of the inputs, and so does the backward pass.
        """
        # one byte per number; the factors are made of it again in the backward pass
        mask = dropout_mask(inputs, dropping)
        factors, gain = widened_mask(mask, dropping.rate, inputs.dtype)
        dropped = inputs * factors
        narrow = paddle.matmul(dropped, first if autocasts() else as_type(first, inputs.dtype))
        ctx.save_for_backward(inputs, mask, narrow, first, second)
        ctx.scaling, ctx.rate, ctx.trains = scaling * gain, dropping.rate, trains(inputs, first, second)
        return paddle.matmul(narrow * ctx.scaling, second if autocasts() else as_type(second, narrow.dtype))

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        """Gradients of inputs, A and B."""
        inputs, mask, narrow, first, second = ctx.saved_tensor()
        (rank, out_size), width, dtype = second.shape, first.shape[0], narrow.dtype
        grad = as_type(grad, dtype)
        factors, _ = widened_mask(mask, ctx.rate, inputs.dtype)
        narrow_grad = paddle.matmul(grad, as_type(second, dtype), transpose_y=True).scale_(ctx.scaling)
        flat = grad.reshape([-1, out_size])
        second_grad = paddle.matmul(narrow.reshape([-1, rank]), flat, transpose_x=True).scale_(ctx.scaling)
        dropped = as_type((inputs * factors).reshape([-1, width]), dtype)
        first_grad = paddle.matmul(narrow_grad.reshape([-1, rank]), dropped, transpose_x=True).transpose([1, 0])
        inputs_grad = None
        if ctx.trains[0]:
            inputs_grad = paddle.matmul(narrow_grad, as_type(first, dtype), transpose_y=True)
            inputs_grad = as_type(inputs_grad, inputs.dtype).multiply_(factors)
        return only(ctx.trains, inputs_grad, as_type(first_grad, first.dtype), as_type(second_grad, second.dtype))
