"""Paddle's fused operators on an NVIDIA GPU, with the arguments that a model has.

A build may lack one of them or compute something else; fused.py compares each with the plain form before it is used.

Source: Dao et al. 2022, "FlashAttention"; paddle.incubate.nn.functional for the others.
"""

from __future__ import annotations

import paddle
from paddle.nn import functional


def attention(queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor, causal: bool) -> paddle.Tensor:
    """See `fused.FusedKernels`."""
    return functional.flash_attention.flash_attention(queries, keys, values, causal=causal)[0]


def packed_attention(
    queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor, starts: paddle.Tensor, longest: int
) -> paddle.Tensor:
    """See `fused.FusedKernels`."""
    scale, flash = queries.shape[-1] ** -0.5, functional.flash_attention.flash_attn_unpadded
    return flash(queries, keys, values, starts, starts, longest, longest, scale, causal=True)[0]


def rms_norm(states: paddle.Tensor, weight: paddle.Tensor, epsilon: float) -> paddle.Tensor:
    """See `fused.FusedKernels`."""
    return paddle.incubate.nn.functional.fused_rms_norm_ext(states, weight, epsilon)[0]


def rotary(states: paddle.Tensor, cosines: paddle.Tensor, sines: paddle.Tensor) -> paddle.Tensor:
    """See `fused.FusedKernels`.  The whole batch as one long row, because the kernel's angles are those of a row."""
    rotate, width = paddle.incubate.nn.functional.fused_rotary_position_embedding, states.shape[-1]
    row = states.reshape([1, -1, states.shape[2], width])
    angles = {"sin": sines.reshape([1, -1, 1, width]), "cos": cosines.reshape([1, -1, 1, width])}
    # its "neox style" turns neighbours; Llama's turn is of the two halves
    return rotate(row, **angles, use_neox_rotary_style=False)[0].reshape(states.shape)


def swiglu(gate: paddle.Tensor, up: paddle.Tensor) -> paddle.Tensor:
    """See `fused.FusedKernels`."""
    newer = getattr(functional, "swiglu", None)  # since paddle 3.3, which warns of the other
    return (newer or paddle.incubate.nn.functional.swiglu)(gate, up)
