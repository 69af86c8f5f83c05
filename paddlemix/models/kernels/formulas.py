"""The formulas of a model, each computed in the fastest way that its tensors allow: the one door of this room.

Layers call these functions and know no device.  Every formula has up to three ways, asked for in this order:

    when                                                              which
    this run selected a fused kernel and it supports the precision   an operator of the GPU or NPU, fused.py
    float32 on the CPU, and the installation built the kernels       C, cpu.py
    otherwise                                                         paddle's operators, functions.py

All ways compute the formula of the docstring; tests hold them against each other.
Shapes: B batch, L query positions, S key positions, H query heads, K key/value heads, E head width, D model width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import paddle
from paddle.nn import functional

from paddlemix.models.kernels import cpu, cpu_library, fused
from paddlemix.models.kernels.attention_functions import AttentionFunction
from paddlemix.models.kernels.functions import (
    GatedFunction,
    RMSNormFunction,
    RotaryFunction,
    as_type,
    autocasts,
    product_type,
)
from paddlemix.models.kernels.fused import selected_kernels
from paddlemix.models.kernels.linear_functions import GatedLinearFunction, NormedLinearsFunction
from paddlemix.models.kernels.operators import repeat_heads

_CAUSAL_BLOCK = 128  # queries computed at a time on CPU, so that the keys that causality hides are left out

# ---- linear layers ----


def linear(inputs: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor | None) -> paddle.Tensor:
    """[..., in] times [in, out] plus [out]."""
    # Paddle's own where a gradient is wanted: it is the one that is recorded.
    if paddle.is_grad_enabled() or not cpu_library.is_supported(inputs, weight):
        return functional.linear(inputs, weight, bias)
    outputs = product(inputs, weight)
    if bias is None:
        return outputs
    return cpu.add_bias_(outputs, bias) if cpu_library.is_supported(bias) else outputs + bias


def product(inputs: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor:
    """[..., in] times [in, out], without a gradient."""
    # A library's product copies the weight before it multiplies, which does not pay for few rows, as of several answers
    # decoded side by side; the kernel in C reads the weight in order.
    if cpu.supports_few_rows(math.prod(inputs.shape[:-1])) and cpu_library.is_supported(inputs, weight):
        return cpu.matmul_few(inputs, weight)
    return paddle.matmul(inputs, weight)


# ---- norms and gates ----


def rms_norm(states: paddle.Tensor, weight: paddle.Tensor, epsilon: float) -> paddle.Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight, [..., D] and [D] -> [..., D] of the same dtype, computed in float32."""
    kernel = selected_kernels().rms_norm
    if kernel is not None and fused.is_supported(states, weight):
        return kernel(states, weight, epsilon)
    return RMSNormFunction.apply(states, weight, epsilon)


def swiglu(gate: paddle.Tensor, up: paddle.Tensor) -> paddle.Tensor:
    """silu(gate) * up, twice [..., D] -> [..., D]."""
    kernel = selected_kernels().swiglu
    return kernel(gate, up) if kernel is not None and fused.is_supported(gate, up) else GatedFunction.apply(gate, up)


def quick_gelu(states: paddle.Tensor) -> paddle.Tensor:
    """x * sigmoid(1.702 x), [...] -> [...]."""
    if not paddle.is_grad_enabled() and cpu_library.is_supported(states):
        return cpu.quick_gelu(states)
    return states * functional.sigmoid(states * 1.702)


# A linear layer keeps its input for the gradient of its weight: after a norm or a gate that is one more tensor of the
# size that the norm or gate keeps itself.  In C it costs little to compute it again, so there the two are one function.


def supports_rms_norm_linears(states: paddle.Tensor, weight: paddle.Tensor, matrices: Sequence[paddle.Tensor]) -> bool:
    """Whether a norm and the linear layers that read it can be one function that keeps less, `rms_norm_linears`."""
    return selected_kernels().rms_norm is None and _trains_in_c(states, weight, *matrices)


def rms_norm_linears(
    states: paddle.Tensor, weight: paddle.Tensor, epsilon: float, matrices: Sequence[paddle.Tensor]
) -> list[paddle.Tensor]:
    """rms_norm(x) W for each matrix W [D, out] -> [..., out] each."""
    return list(NormedLinearsFunction.apply(states, weight, epsilon, *matrices))


def supports_swiglu_linear(gate: paddle.Tensor, up: paddle.Tensor, matrix: paddle.Tensor) -> bool:
    """Whether a gate and the linear layer that reads it can be one function that keeps less, `swiglu_linear`."""
    return selected_kernels().swiglu is None and _trains_in_c(gate, up, matrix)


def swiglu_linear(gate: paddle.Tensor, up: paddle.Tensor, matrix: paddle.Tensor) -> paddle.Tensor:
    """swiglu(gate, up) W, twice [..., in] and [in, out] -> [..., out]."""
    return GatedLinearFunction.apply(gate, up, matrix)


def _trains_in_c(*tensors: paddle.Tensor) -> bool:
    # Under autocast the products would be in half precision, which the kernels in C do not support; without a gradient
    # nothing is kept, so that there is nothing to save.
    return paddle.is_grad_enabled() and not paddle.amp.is_autocast_enabled() and cpu_library.is_supported(*tensors)


# ---- rotary positions ----


def angles_serve_all_heads(angles: paddle.Tensor) -> bool:
    """Whether `rotate` reads the angles of a position once for all heads; else it wants them repeated for every head,
    because paddle's product of equal shapes is many times faster on CPU than one that broadcasts."""
    return selected_kernels().rotary is not None or cpu_library.is_supported(angles)


def rotate(
    states: paddle.Tensor, cosines: paddle.Tensor, sines: paddle.Tensor, half_turn: paddle.Tensor
) -> paddle.Tensor:
    """x * cosines + (x @ half_turn) * sines, [B, L, heads, E], twice [B, L, 1 or heads, E] and [E, E] -> as the states.

    The half turn is a product, whose gradient is one too: slicing and concatenating takes four times as long on CPU.
    """
    # A fused kernel reads two tables in the type of the states and needs no half turn.
    kernel = selected_kernels().rotary
    if kernel is not None and fused.is_supported(states):
        return kernel(states, cosines.astype(states.dtype), sines.astype(states.dtype))
    return RotaryFunction.apply(states, cosines, sines, half_turn)


# ---- attention ----


def prefers_segment_lengths() -> bool:
    """Whether packed rows are computed sample by sample here, by lengths known to the host.

    On CPU scores that a mask throws away cost as much as those that count; some fused kernels take lengths.  Other
    devices want few large products, under a mask.
    """
    return paddle.get_device() == "cpu" or selected_kernels().packed_attention is not None


def has_causal_attention(packed: bool) -> bool:
    """Whether this run has a kernel that computes causal rows, or the samples of packed rows, without a mask."""
    kernels = selected_kernels()
    return (kernels.packed_attention if packed else kernels.attention) is not None


def supports_causal_attention(queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor) -> bool:
    """Whether the kernel of `has_causal_attention` computes in the precision of these tensors."""
    return fused.is_supported(queries, keys, values)


def causal_attention(queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor) -> paddle.Tensor:
    """Every query sees the keys up to its own position; [B, L, H, E] and twice [B, L, K, E] -> [B, L, H, E]."""
    kernel = selected_kernels().attention
    assert kernel is not None, "ask has_causal_attention first"
    return kernel(queries, keys, values, True)


def packed_causal_attention(
    queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor, starts: paddle.Tensor, longest: int
) -> paddle.Tensor:
    """As `causal_attention` within each of the n runs of T flat positions.

    Args:
        queries: [T, H, E]; keys, values: [T, K, E].
        starts: int32 [n + 1], first flat position of each run, and T.
        longest: positions of the longest run.
    """
    kernel = selected_kernels().packed_attention
    assert kernel is not None, "ask has_causal_attention first"
    return kernel(queries, keys, values, starts, longest)


def full_attention(queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor) -> paddle.Tensor:
    """Every query sees every key; [B, L, H, E] and twice [B, S, K, E] -> [B, L, H, E]."""
    kernel = selected_kernels().attention
    if kernel is not None and fused.is_supported(queries, keys, values):
        return kernel(queries, keys, values, False)
    return masked_attention(queries, keys, values, None)


def masked_attention(
    queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor, bias: paddle.Tensor | None
) -> paddle.Tensor:
    """softmax(q k^T / sqrt(E) + bias) v for every head; [B, L, H, E] and twice [B, S, K, E] -> [B, L, H, E].

    Args:
        bias: float32 [L, S], causal and the same for all rows, or [B, 1, L, S]; None adds nothing.
    """
    # C reads a shared key head in place; paddle's batched products want as many heads on both sides.
    groups = queries.shape[2] // keys.shape[2]
    if groups > 1 and not cpu.supports_attention(queries, keys, values, bias):
        keys, values = (repeat_heads(states, groups) for states in (keys, values))
    # Only a causal matrix hides blocks of keys altogether, and only a CPU gains by leaving them out: elsewhere few
    # large products are faster.
    causal = bias is not None and bias.ndim == 2
    block = _CAUSAL_BLOCK if causal and paddle.get_device() == "cpu" else None
    return AttentionFunction.apply(queries, keys, values, bias, block)


def in_one_type(queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor) -> list[paddle.Tensor]:
    """All three in the type that a product with the values is computed in: their own, or the one autocast chooses.

    Under autocast, sums and rotations come in float32; the backward pass, which runs outside autocast, needs one type.
    """
    dtype = product_type(values)
    return [as_type(states, dtype) for states in (queries, keys, values)]


def without_autocast() -> contextlib.AbstractContextManager[None]:
    """A block in which products keep the type of their tensors."""
    return paddle.amp.auto_cast(enable=False) if autocasts() else contextlib.nullcontext()
