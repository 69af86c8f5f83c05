"""Forward and backward passes written out where paddle's automatic ones are slow or keep too much.

Each equals the plain formula in its docstring; tests compare values and gradients.  What is gained, mostly on CPU:
results are written in place, and less is kept for the backward pass.
None of them has a second derivative.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle.autograd import PyLayer
from paddle.nn import functional

from paddlemix.models.kernels import cpu, cpu_library
from paddlemix.models.kernels.operators import column_sums, dropout_mask, on_cpu, row_sums, widened_mask

NARROW_COST = 3  # a product with a factor of few columns runs at about a third of the rate


def trains(*tensors: paddle.Tensor) -> tuple[bool, ...]:
    """Which of a function's inputs need a gradient: paddle takes none for the others.  To be asked in the forward pass,
    because recomputation gives back other tensors than were saved."""
    return tuple(not tensor.stop_gradient for tensor in tensors)


def only(wanted: tuple[bool, ...], *grads: paddle.Tensor | None) -> tuple[paddle.Tensor | None, ...]:
    """What a backward pass returns: None where no gradient is wanted, as `trains` told."""
    return tuple(grad if want else None for want, grad in zip(wanted, grads, strict=True))


def autocasts() -> bool:
    """Whether autocast chooses the type of products here."""
    return bool(paddle.amp.is_autocast_enabled())


def product_type(tensor: paddle.Tensor) -> paddle.dtype:
    """What a product with a tensor is computed in: its own type, or the one that autocast gives to a float32.

    A function whose forward pass autocast may change keeps its inputs in this type, because its backward pass runs
    outside autocast and gets gradients of it.
    """
    if autocasts() and tensor.dtype == paddle.float32:
        return getattr(paddle, paddle.get_autocast_dtype())
    return tensor.dtype


def as_type(tensor: paddle.Tensor, dtype: paddle.dtype) -> paddle.Tensor:
    """The tensor in a dtype; itself where it has it, since paddle's cast would put a step into the gradient's way."""
    return tensor if tensor.dtype == dtype else tensor.astype(dtype)


def _spread(column: paddle.Tensor, width: int) -> paddle.Tensor:
    """[rows, 1] as a factor of [rows, width].  On CPU a product with ones: broadcasting takes three times as long."""
    if column.dtype != paddle.float32 or not on_cpu(column):
        return column
    return paddle.matmul(column, paddle.ones([1, width]))


def _repeat(row: paddle.Tensor, rows: int) -> paddle.Tensor:
    """[width] as a factor of [rows, width], see `_spread`."""
    if row.dtype != paddle.float32 or not on_cpu(row):
        return row
    return paddle.matmul(paddle.ones([rows, 1]), row.unsqueeze(0))


class RMSNormFunction(PyLayer):
    """x / sqrt(mean(x^2) + epsilon) * weight, computed in float32."""

    @staticmethod
    def forward(ctx: Any, inputs: paddle.Tensor, weight: paddle.Tensor, epsilon: float) -> paddle.Tensor:
        """[..., D], [D] -> [..., D] of the inputs' dtype."""
        width = inputs.shape[-1]
        ctx.trains, ctx.compiled = trains(inputs, weight), cpu_library.is_supported(inputs, weight)
        if ctx.compiled:
            outputs, scales = cpu.rms_norm(inputs, weight, epsilon)
            ctx.save_for_backward(inputs, scales, weight)
            return outputs
        flat = inputs.reshape([-1, width]).astype("float32")
        scale = paddle.rsqrt(row_sums(flat * flat) * (1.0 / width) + epsilon)  # [rows, 1]
        normalised = flat * _spread(scale, width)
        ctx.save_for_backward(normalised, scale, weight)
        ctx.shape, ctx.dtype = inputs.shape, inputs.dtype
        return (normalised.astype(inputs.dtype) * _repeat(weight, len(flat))).reshape(inputs.shape)

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        """Gradients of inputs and weight."""
        normalised, scale, weight = ctx.saved_tensor()
        if ctx.compiled:
            grads = cpu.rms_norm_backward(grad.contiguous(), normalised, weight, scale, ctx.trains[1])
            return only(ctx.trains, *grads)
        rows, width = normalised.shape
        flat = grad.reshape([rows, width]).astype("float32")
        through = flat * _repeat(weight.astype("float32"), rows)
        mean = row_sums(through * normalised) * (1.0 / width)
        inputs_grad = through.subtract_(normalised * _spread(mean, width)).multiply_(_spread(scale, width))
        inputs_grad = inputs_grad.astype(ctx.dtype).reshape(ctx.shape)
        weight_grad = None
        if ctx.trains[1]:
            weight_grad = column_sums(flat * normalised).astype(weight.dtype)
        return only(ctx.trains, inputs_grad, weight_grad)


class GatedFunction(PyLayer):
    """silu(gate) * up, where silu(x) = x * sigmoid(x)."""

    @staticmethod
    def forward(ctx: Any, gate: paddle.Tensor, up: paddle.Tensor) -> paddle.Tensor:
        """Twice [..., D] -> [..., D]."""
        ctx.trains = trains(gate, up)
        ctx.save_for_backward(gate, up)
        if cpu_library.is_supported(gate, up):
            return cpu.gated(gate, up)
        return functional.silu(gate).multiply_(up)

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        """Gradients of gate and up."""
        gate, up = ctx.saved_tensor()
        if cpu_library.is_supported(grad, gate, up):
            return only(ctx.trains, *cpu.gated_backward(grad, gate, up))
        sigmoid = functional.sigmoid(gate)
        active = gate * sigmoid
        up_grad = grad * active
        # silu'(x) = sigmoid * (1 + x * (1 - sigmoid)); x * (1 - sigmoid) is x - active, but NPU subtracts no bfloat16
        left = gate - active if on_cpu(gate) else gate * sigmoid.scale(-1.0, 1.0)
        slope = left.scale_(1.0, 1.0).multiply_(sigmoid)
        return only(ctx.trains, slope.multiply_(grad).multiply_(up), up_grad)


class RotaryFunction(PyLayer):
    """x * cosines + (x @ half_turn) * sines.  Keeps the tables alone, which all layers share."""

    @staticmethod
    def forward(
        ctx: Any, states: paddle.Tensor, cosines: paddle.Tensor, sines: paddle.Tensor, half_turn: paddle.Tensor
    ) -> paddle.Tensor:
        """[B, L, H, E] three times and [E, E] -> [B, L, H, E]."""
        ctx.save_for_backward(cosines, sines, half_turn)
        if cpu.supports_rotation(states, cosines, sines):
            return cpu.rotate(states, cosines, sines)
        return (states * cosines).add_(paddle.matmul(states, half_turn).multiply_(sines))

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        """Gradient of the states."""
        cosines, sines, half_turn = ctx.saved_tensor()
        if cpu.supports_rotation(grad, cosines, sines):
            return cpu.rotate(grad, cosines, sines, back=True), None, None, None
        turned = paddle.matmul(grad * sines, half_turn, transpose_y=True)
        return (grad * cosines).add_(turned), None, None, None


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
        ctx: Any, inputs: paddle.Tensor, first: paddle.Tensor, second: paddle.Tensor, scaling: float, rate: float
    ) -> paddle.Tensor:
        """[..., in], [in, r], [r, out] -> [..., out]; `rate` is the share that is dropped.

        Products run in the type that autocast gives them, else in that of the inputs, and so does the backward pass.
        """
        mask = dropout_mask(inputs, rate)
        factors, gain = widened_mask(mask, rate, inputs.dtype)
        dropped = inputs * factors
        narrow = paddle.matmul(dropped, first if autocasts() else as_type(first, inputs.dtype))
        ctx.save_for_backward(inputs, mask, narrow, first, second)
        ctx.scaling, ctx.rate, ctx.trains = scaling * gain, rate, trains(inputs, first, second)
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
