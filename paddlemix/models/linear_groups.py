"""Linear layers together with the pass before them, so that training does not keep what stands between.

A linear layer keeps its input for the gradient of its weight: behind a norm or a gate that is one more tensor of the
same size as what the norm or gate keeps itself.  With compiled kernels it costs little to make it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import paddle
from paddle import nn
from paddle.autograd import PyLayer

from paddlemix.models.kernels import cpu, cpu_library
from paddlemix.models.kernels.functions import GatedFunction, only, trains
from paddlemix.models.kernels.fused import is_supported, selected_kernels
from paddlemix.models.layers import RMSNorm, apply_linear


def normed_linears(norm: RMSNorm, layers: Sequence[nn.Layer], inputs: paddle.Tensor) -> list[paddle.Tensor]:
    """Several linear layers of norm(inputs), [..., in] -> [..., out] each."""
    weights = [layer.weight for layer in layers if _is_plain(layer)]
    fused = selected_kernels().rms_norm is not None
    if not fused and len(weights) == len(layers) and _trains_compiled(inputs, norm.weight, *weights):
        return list(_NormedLinearsFunction.apply(inputs, norm.weight, norm.epsilon, *weights))
    normed = norm(inputs)
    return [apply_linear(layer, normed) for layer in layers]


def gated_linear(layer: nn.Layer, gate: paddle.Tensor, up: paddle.Tensor) -> paddle.Tensor:
    """A linear layer of silu(gate) * up, [..., in] -> [..., out]."""
    if selected_kernels().swiglu is None and _is_plain(layer) and _trains_compiled(gate, up, layer.weight):
        return _GatedLinearFunction.apply(gate, up, layer.weight)
    return apply_linear(layer, gated(gate, up))


def gated(gate: paddle.Tensor, up: paddle.Tensor) -> paddle.Tensor:
    """silu(gate) * up, twice [..., D] -> [..., D]."""
    kernel = selected_kernels().swiglu
    return kernel(gate, up) if kernel is not None and is_supported(gate, up) else GatedFunction.apply(gate, up)


def _is_plain(layer: nn.Layer) -> bool:
    return type(layer) is nn.Linear and layer.bias is None


def _trains_compiled(*tensors: paddle.Tensor) -> bool:
    return paddle.is_grad_enabled() and not paddle.amp.is_autocast_enabled() and cpu_library.is_supported(*tensors)


class _NormedLinearsFunction(PyLayer):
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
        normed_grad = paddle.matmul(grads[0], matrices[0], transpose_y=True)
        for grad, matrix in zip(grads[1:], matrices[1:], strict=True):
            normed_grad.add_(paddle.matmul(grad, matrix, transpose_y=True))
        found = cpu.rms_norm_backward(normed_grad, inputs, weight, scales, ctx.trains[1])
        return *only(ctx.trains[:2], *found), *matrix_grads


class _GatedLinearFunction(PyLayer):
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
    inputs = make_inputs()
    flat = inputs.reshape([-1, inputs.shape[-1]])
    return [
        paddle.matmul(flat, grad.reshape([-1, grad.shape[-1]]), transpose_x=True) if want else None
        for grad, want in zip(grads, wanted, strict=True)
    ]
