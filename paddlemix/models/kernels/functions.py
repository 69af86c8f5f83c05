"""Forward and backward passes written out where paddle's automatic ones are slow or keep too much.

Each equals the plain formula in its docstring; tests compare values and gradients.  The gain, mostly on CPU: results
are written in place, and less is kept for the backward pass.
None of them has a second derivative.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle.autograd import PyLayer
from paddle.nn import functional

from paddlemix.models.kernels import cpu, cpu_library
from paddlemix.models.kernels.operators import column_sums, on_cpu, row_sums


def trains(*tensors: paddle.Tensor) -> tuple[bool, ...]:
    """Which of a function's inputs need a gradient: paddle takes none for the others.  To be asked in the forward pass,
    because recomputation returns other tensors than were saved."""
    return tuple(not tensor.stop_gradient for tensor in tensors)


def only(wanted: tuple[bool, ...], *grads: paddle.Tensor | None) -> tuple[paddle.Tensor | None, ...]:
    """What a backward pass returns: None where no gradient is wanted, as `trains` returned."""
    return tuple(grad if want else None for want, grad in zip(wanted, grads, strict=True))


def autocasts() -> bool:
    """Whether autocast chooses the type of products here."""
    return bool(paddle.amp.is_autocast_enabled())


def product_type(tensor: paddle.Tensor) -> paddle.dtype:
    """What a product with a tensor is computed in: its own type, or the one that autocast chooses for float32.

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
        # in float32 whatever the inputs are: a sum of squares overflows in float16 and loses digits in bfloat16
        flat = inputs.reshape([-1, width]).astype("float32")
        scale = paddle.rsqrt(row_sums(flat * flat) * (1.0 / width) + epsilon)  # [rows, 1]
        normalised = flat * _spread(scale, width)  # kept in place of the inputs: the backward pass needs nothing else
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
        # d x = (g w - n mean(g w n)) * scale, where n is the normalised input
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
        # Asked for again: a gradient may come in another layout than the inputs.
        if cpu_library.is_supported(grad, gate, up):
            return only(ctx.trains, *cpu.gated_backward(grad, gate, up))
        sigmoid = functional.sigmoid(gate)
        active = gate * sigmoid
        up_grad = grad * active
        # silu'(x) = sigmoid * (1 + x * (1 - sigmoid)); x * (1 - sigmoid) is x - active, but NPU subtracts no bfloat16
        left = gate - active if on_cpu(gate) else gate * sigmoid.scale(-1.0, 1.0)
        # in place, since nothing reads `left` any more: sigmoid * (1 + left)
        slope = left.scale_(1.0, 1.0).multiply_(sigmoid)
        return only(ctx.trains, slope.multiply_(grad).multiply_(up), up_grad)


class RotaryFunction(PyLayer):
    """x * cosines + (x @ half_turn) * sines.  Keeps the tables alone, which all layers share."""

    @staticmethod
    def forward(
        ctx: Any, states: paddle.Tensor, cosines: paddle.Tensor, sines: paddle.Tensor, half_turn: paddle.Tensor
    ) -> paddle.Tensor:
        """[B, L, H, E] three times and [E, E] -> [B, L, H, E]."""
        # The rotation is linear: its gradient needs no states.
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
        # the transposed half turn turns back
        turned = paddle.matmul(grad * sines, half_turn, transpose_y=True)
        return (grad * cosines).add_(turned), None, None, None
