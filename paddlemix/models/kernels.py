"""Forward and backward passes written out where paddle's automatic ones are slow or keep too much.

Each equals the plain formula in its docstring; tests compare values and gradients.  On CPU the gain is in the backward
pass: reductions are products with ones, and one tensor is kept instead of four.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle.autograd import PyLayer


class RMSNormFunction(PyLayer):
    """x / sqrt(mean(x^2) + epsilon) * weight, computed in float32."""

    @staticmethod
    def forward(ctx: Any, inputs: paddle.Tensor, weight: paddle.Tensor, epsilon: float) -> paddle.Tensor:
        """[..., D], [D] -> [..., D] of the inputs' dtype."""
        width = inputs.shape[-1]
        flat = inputs.reshape([-1, width]).astype("float32")
        ones = paddle.ones([width, 1], dtype="float32")
        scale = paddle.rsqrt(paddle.matmul(flat * flat, ones) * (1.0 / width) + epsilon)  # [rows, 1]
        normalised = flat * scale
        ctx.save_for_backward(normalised, scale, weight)
        ctx.shape, ctx.dtype = inputs.shape, inputs.dtype
        return (normalised.astype(inputs.dtype) * weight).reshape(inputs.shape)

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor | None]:
        """Gradients of inputs and weight."""
        normalised, scale, weight = ctx.saved_tensor()
        rows, width = normalised.shape
        flat = grad.reshape([rows, width]).astype("float32")
        through = flat * weight.astype("float32")
        mean = paddle.matmul(through * normalised, paddle.ones([width, 1], dtype="float32")) * (1.0 / width)
        inputs_grad = ((through - normalised * mean) * scale).astype(ctx.dtype).reshape(ctx.shape)
        if weight.stop_gradient:
            return inputs_grad, None
        weight_grad = paddle.matmul(paddle.ones([1, rows], dtype="float32"), flat * normalised).reshape([width])
        return inputs_grad, weight_grad.astype(weight.dtype)
