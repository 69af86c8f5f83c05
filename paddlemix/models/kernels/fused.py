"""Fused kernels of the device: which of them a model computes with.  The formulas ask `selected_kernels()`.

A kernel is used only if the device has it and it computes what the plain form does: values and gradients of a small
case of this model's head size and widths are compared when a model is loaded or a run begins.  Candidates are paddle's
kernels on an NVIDIA GPU and the plugin's own operators (npu_operators.py) on an Ascend NPU.  On CPU nothing is even
tried, because paddle 3.3.1's fused RMS norm ends the process there; a CPU has the kernels of cpu.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import paddle
from paddle.nn import functional

from paddlemix.models.kernels import cpu_library, gpu_operators, npu_operators
from paddlemix.models.kernels.operators import repeat_heads

PRECISIONS = ("bfloat16", "float16")  # what paddle's flash attention takes
_TOLERANCE = {"bfloat16": 4e-2, "float16": 5e-3, "float32": 1e-4}  # of the largest number, for values and gradients
_EPSILON = 1e-5
_LENGTHS = (37, 20, 7)  # no multiples of a kernel's blocks, where a mistake would not show

Kernel = Callable[..., paddle.Tensor]


class DecoderSizes(Protocol):
    """The sizes of a decoder that its kernels depend on; `configuration.DecoderConfig` has them."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def head_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def key_value_heads(self) -> int: ...


@dataclass(frozen=True)
class KernelSizes:
    """What a kernel is tried with: some support certain sizes alone.

    Args:
        width: D of the hidden states that are normalised.
        inner: width of the feed-forward part.
        head_size: E.
        groups: query heads of each key/value head.
    """

    width: int = 4096
    inner: int = 11008
    head_size: int = 128
    groups: int = 1

    @classmethod
    def of(cls, text: DecoderSizes) -> KernelSizes:
        """Those of a decoder."""
        groups = text.num_attention_heads // text.key_value_heads
        return cls(text.hidden_size, text.intermediate_size, text.head_size, groups)


@dataclass(frozen=True)
class FusedKernels:
    """A run's kernels; None where the plain form is computed.

    Args:
        attention: (queries [B, L, H, E], keys, values [B, S, K, E], causal) -> [B, L, H, E].
        packed_attention: (queries [T, H, E], keys, values [T, K, E], starts int32 [n + 1], longest) -> [T, H, E],
            causal within each of the n runs of T flat positions.
        rms_norm: (states [..., D], weight [D], epsilon) -> [..., D].
        rotary: (states [B, L, H, E], cosines, sines [B, L, 1, E]) -> [B, L, H, E].
        swiglu: (gate [..., D], up [..., D]) -> silu(gate) * up.
    """

    attention: Kernel | None = None
    packed_attention: Kernel | None = None
    rms_norm: Kernel | None = None
    rotary: Kernel | None = None
    swiglu: Kernel | None = None


_NONE = FusedKernels()
_chosen = _NONE


def selected_kernels() -> FusedKernels:
    """The kernels of this run; none of them before `choose_kernels`."""
    return _chosen


def is_supported(*tensors: paddle.Tensor) -> bool:
    """Whether tensors are all of one precision that fused kernels support."""
    dtype = tensors[0].dtype
    return all(tensor.dtype == dtype for tensor in tensors) and is_supported_type(dtype)


def is_supported_type(dtype: paddle.dtype) -> bool:
    """Whether fused kernels compute in a precision."""
    return str(dtype).rpartition(".")[2] in PRECISIONS


def choose_kernels(wanted: bool | None, device: str, dtype: str, sizes: KernelSizes | None = None) -> list[str]:
    """Decides what `selected_kernels` returns from now on.

    Args:
        wanted: the run's `use_flash_attention`; None selects what the device has, False nothing.
        device: as paddle names it, current.
        dtype: what is computed in.
        sizes: of the model; None for those of a 7B.

    Returns:
        The decision in words: a line for each kernel, or one where the plain forms are used for all; on NPU also one
        for a plugin's library without operators, on CPU `cpu_kernels`.
    """
    # when                                       which
    # cpu                                        those in C, whatever is wanted
    # `wanted` is False                          plain
    # a device or a precision without any        plain
    # else                                       each that computes what its plain form does
    global _chosen
    _chosen = _NONE
    kind = device.partition(":")[0]
    if kind == "cpu":
        unused = [f"use_flash_attention: paddle has fused kernels for {', '.join(_KERNELS)}, not for cpu"]
        return [cpu_kernels(), *(unused if wanted else [])]
    if wanted is False:
        return ["plain kernels (use_flash_attention false)"]
    if kind not in _KERNELS:
        return [f"plain kernels: there are fused ones for {', '.join(_KERNELS)}, not for {device}"]
    if dtype not in PRECISIONS:
        return [f"plain kernels: fused ones compute in {' or '.join(PRECISIONS)}, not in {dtype}; set bf16 true"]
    lines = list(npu_operators.register()) if kind == "npu" else []
    for name, kernel in _KERNELS[kind].items():
        reason = _why_not(name, kernel, dtype, sizes or KernelSizes())
        lines.append(f"{name}: {'fused' if reason is None else f'plain, {reason}'}")
        if reason is None:
            _chosen = replace(_chosen, **{name: kernel})
    return lines


def cpu_kernels() -> str:
    """What a CPU computes with, in words: "compiled kernels: avx512", or why there are none and what to do."""
    reason = cpu_library.missing()
    if reason is None:
        return f"compiled kernels: {cpu_library.kind()}"
    return f"no compiled kernels, paddle's operators alone: {reason}"


def use_plain_kernels() -> None:
    """Undoes `choose_kernels`."""
    global _chosen
    _chosen = _NONE


_KERNELS: dict[str, dict[str, Kernel]] = {
    "gpu": {
        "attention": gpu_operators.attention,
        "packed_attention": gpu_operators.packed_attention,
        "rms_norm": gpu_operators.rms_norm,
        "rotary": gpu_operators.rotary,
        "swiglu": gpu_operators.swiglu,
    },
    "npu": {
        "attention": npu_operators.attention,
        "rms_norm": npu_operators.rms_norm,
        "rotary": npu_operators.rotary,
        "swiglu": gpu_operators.swiglu,
    },
}


def _why_not(name: str, kernel: Kernel, dtype: str, sizes: KernelSizes) -> str | None:
    """Why a kernel cannot be used; None where it computes what the plain form does."""
    shapes, more, plain = _CASES[name](sizes)
    try:
        found = _values_and_gradients(kernel, shapes, more, dtype)
    except Exception as error:  # whatever a build that lacks the kernel raises
        return f"{type(error).__name__}: {str(error).strip().rpartition(chr(10))[2]}"
    # The plain form computes in float32, so that the tolerance is that of the kernel's precision alone.
    expected = _values_and_gradients(plain, shapes, more, "float32")
    for is_value, other in zip(found, expected, strict=True):
        difference = float(np.abs(is_value - other).max()) / max(float(np.abs(other).max()), 1e-6)
        if not difference <= _TOLERANCE[dtype]:
            return f"it differs from the plain form by {difference:.2g} of the largest number"
    return None


def _values_and_gradients(kernel: Kernel, sizes: list[list[int]], more: list[Any], dtype: str) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    inputs = [paddle.to_tensor(random.standard_normal(size, dtype=np.float32)).astype(dtype) for size in sizes]
    for tensor in inputs:
        tensor.stop_gradient = False
    output = kernel(*inputs, *(part.astype(dtype) if _is_real(part) else part for part in more))
    slope = paddle.to_tensor(random.standard_normal(output.shape, dtype=np.float32)).astype(output.dtype)
    grads = paddle.grad([output], inputs, grad_outputs=[slope])
    return [part.detach().astype("float32").numpy() for part in (output, *grads)]


def _is_real(part: Any) -> bool:
    return isinstance(part, paddle.Tensor) and part.dtype == paddle.float32


_Case = tuple[list[list[int]], list[Any], Kernel]  # shapes of the inputs, further arguments, the plain form
_KEY_HEADS = 2


def _heads(sizes: KernelSizes) -> tuple[int, int, int]:
    """Of queries, keys and values."""
    return _KEY_HEADS * sizes.groups, _KEY_HEADS, _KEY_HEADS


def _attention_case(sizes: KernelSizes) -> _Case:
    return [[2, _LENGTHS[0], heads, sizes.head_size] for heads in _heads(sizes)], [True], _plain_attention


def _packed_case(sizes: KernelSizes) -> _Case:
    starts = paddle.to_tensor(np.cumsum((0, *_LENGTHS)), dtype="int32")
    shapes = [[sum(_LENGTHS), heads, sizes.head_size] for heads in _heads(sizes)]
    return shapes, [starts, max(_LENGTHS)], _plain_packed


def _rms_norm_case(sizes: KernelSizes) -> _Case:
    return [[2, 5, sizes.width], [sizes.width]], [_EPSILON], _plain_rms_norm


def _rotary_case(sizes: KernelSizes) -> _Case:
    """Two rows whose positions differ, as those of packed rows do."""
    angles = np.random.default_rng(1).uniform(0, 6, [2, 5, 1, sizes.head_size // 2]).astype(np.float32)
    tables = [paddle.to_tensor(np.tile(turn(angles), 2)) for turn in (np.cos, np.sin)]
    return [[2, 5, _heads(sizes)[0], sizes.head_size]], tables, _plain_rotary


def _swiglu_case(sizes: KernelSizes) -> _Case:
    return [[2, 5, sizes.inner]] * 2, [], lambda gate, up: functional.silu(gate) * up


_CASES: dict[str, Callable[[KernelSizes], _Case]] = {
    "attention": _attention_case,
    "packed_attention": _packed_case,
    "rms_norm": _rms_norm_case,
    "rotary": _rotary_case,
    "swiglu": _swiglu_case,
}
assert set(_CASES) == {field.name for field in fields(FusedKernels)}


def _plain_attention(queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor, causal: bool) -> paddle.Tensor:
    groups, length = queries.shape[2] // keys.shape[2], queries.shape[1]
    keys, values = (repeat_heads(part, groups) for part in (keys, values))
    queries, keys, values = (part.transpose([0, 2, 1, 3]) for part in (queries, keys, values))
    scores = paddle.matmul(queries, keys, transpose_y=True) * queries.shape[-1] ** -0.5
    if causal:
        scores = scores + paddle.to_tensor(np.triu(np.full((length, length), -1e9, dtype=np.float32), 1))
    return paddle.matmul(functional.softmax(scores, axis=-1), values).transpose([0, 2, 1, 3])


def _plain_packed(
    queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor, starts: paddle.Tensor, longest: int
) -> paddle.Tensor:
    del starts, longest
    parts = (part.unsqueeze(0).split(list(_LENGTHS), axis=1) for part in (queries, keys, values))
    runs = [_plain_attention(query, key, value, True) for query, key, value in zip(*parts, strict=True)]
    return paddle.concat(runs, axis=1).squeeze(0)


def _plain_rms_norm(states: paddle.Tensor, weight: paddle.Tensor, epsilon: float) -> paddle.Tensor:
    return states * paddle.rsqrt((states * states).mean(axis=-1, keepdim=True) + epsilon) * weight


def _plain_rotary(states: paddle.Tensor, cosines: paddle.Tensor, sines: paddle.Tensor) -> paddle.Tensor:
    first, second = states.split(2, axis=-1)
    return states * cosines + paddle.concat([-second, first], axis=-1) * sines
