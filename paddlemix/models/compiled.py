"""Kernels in C for float32 on CPU (*_kernels.c), where paddle's own are many passes, mostly on one thread.

Built when the package is installed, if there is a C compiler.  `takes` is false where they are missing or switched off
(PADDLEMIX_CPU_KERNELS=0), or a tensor is of another kind; callers then compute the plain form in paddle operators.
Nothing here is recorded for a gradient: callers are backward passes of their own, or run without one.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paddle

from paddlemix.device.environment import is_on
from paddlemix.models.parallel import openmp, threads_here

_AGAIN = "install paddlemix once more (pip install -e .)"
_SWITCH = "PADDLEMIX_CPU_KERNELS"  # see the table in paddlemix/device/settings.py
_MOST_FEW_ROWS = 16
_VERSION = 1  # KERNELS_VERSION in cpu_kernels.c
_LEAST_NUMBERS = 1 << 15  # below so many, waking another thread takes longer than computing them
_BLOCK, _LEAST_BLOCK, _SCORES = 128, 16, 1 << 17  # queries of an attention's block; a block's scores stay in the cache
# What processors must have for a kind, best first; setup.py builds the same
_KINDS = {
    "avx512": {"avx512f", "avx512vl", "avx512dq", "avx512bw", "avx512cd"},
    "avx2": {"avx2", "fma"},
    "plain": set(),
}

_LONG, _POINTER, _FLOAT = ctypes.c_long, ctypes.c_void_p, ctypes.c_float
_ARGUMENTS: dict[str, tuple[Any, ...]] = {  # behind the number of threads
    "rms_norm": (_LONG, _LONG, _POINTER, _POINTER, _FLOAT, _POINTER, _POINTER),
    "rms_norm_backward": (_LONG, _LONG) + (_POINTER,) * 6,
    "add_bias": (_LONG, _LONG, _POINTER, _POINTER),
    "quick_gelu": (_LONG, _POINTER, _POINTER),
    "gated": (_LONG, _POINTER, _POINTER, _POINTER),
    "gated_backward": (_LONG,) + (_POINTER,) * 5,
    "rotate": (_LONG, _LONG, _LONG, _POINTER, _POINTER, _POINTER, _FLOAT, _POINTER),
    "attention": (_POINTER,) * 6 + (_FLOAT, _POINTER, _POINTER),
    "attention_backward": (_POINTER,) * 7 + (_FLOAT,) + (_POINTER,) * 4,
    "attend_cached": (_POINTER,) * 9 + (_FLOAT, _POINTER),
    "matmul_few": (_LONG, _LONG, _LONG, _POINTER, _POINTER, _POINTER),
    "cross_entropy": (_LONG, _LONG, _POINTER, _POINTER, _POINTER, _POINTER),
    # of quantized_kernels.c: `run` is called for these
    "int8_product": (_LONG,) * 3 + (_POINTER,) * 4,
    "nf4_product": (_LONG,) * 3 + (_POINTER,) * 7,
    "int8_widen": (_LONG,) * 3 + (_POINTER,) * 3,
    "nf4_widen": (_LONG,) * 3 + (_POINTER,) * 6,
}


class _AttentionSizes(ctypes.Structure):
    _fields_ = [
        (name, _LONG)
        for name in ("batch", "queries", "keys", "heads", "key_heads", "width", "block", "causal", "bias_step")
    ]


class _CachedSizes(ctypes.Structure):
    _fields_ = [(name, _LONG) for name in ("batch", "tokens", "heads", "key_heads", "width", "room", "held", "window")]


class CachedTokens:
    """What `attend_cached_` needs to know of new tokens behind a cache, for all layers.

    Args:
        heads: (H, K), of queries and of keys.
        angles: cosines and sines [B, L, 1, E], each of equal halves.
        hidden: int64 [B], leading positions of the cache that a row does not see.
        room, held: positions of the cache's buffers, and those written before.
        window: positions that a token sees, its own included; None for all.
    """

    def __init__(
        self,
        heads: tuple[int, int],
        angles: tuple[paddle.Tensor, paddle.Tensor],
        hidden: paddle.Tensor,
        room: int,
        held: int,
        window: int | None,
    ) -> None:
        batch, self.count, _, width = angles[0].shape
        self.sizes = _CachedSizes(batch, self.count, *heads, width, room, held, window or room)
        self.angles, self.hidden, self.scale = angles, hidden, width**-0.5
        self.threads = _threads(batch * self.count * heads[0] * width * (held + self.count))
        self.scratch = _empty([self.threads, room + width])


_switched_off = False


@contextmanager
def switched_off() -> Iterator[None]:
    """Within this block everything is computed in its plain form: to compare the two."""
    global _switched_off
    before, _switched_off = _switched_off, True
    try:
        yield
    finally:
        _switched_off = before


def missing() -> str | None:
    """Why there are no compiled kernels, then what to do, as "what; what to do"; None where there are.

    Raises:
        UserError: PADDLEMIX_CPU_KERNELS is neither 0 nor 1; so does every function here that needs a kernel.
    """
    return _load()[1]


def kind() -> str | None:
    """The kind that is computed with, a key of `_KINDS`: "avx512", "avx2" or "plain"; None where `missing` says why."""
    best = _best_file()
    return None if best is None or missing() is not None else best[0]


def takes(*tensors: paddle.Tensor) -> bool:
    """Whether the kernels can compute with tensors: all float32, contiguous and on the CPU."""
    if _switched_off or _load()[0] is None:
        return False
    float32 = paddle.float32
    return all(tensor.dtype == float32 and tensor.place.is_cpu_place() and tensor.is_contiguous() for tensor in tensors)


def rms_norm(inputs: paddle.Tensor, weight: paddle.Tensor, epsilon: float) -> tuple[paddle.Tensor, paddle.Tensor]:
    """[..., D], [D] -> [..., D] and each row's factor [rows]."""
    outputs, scales = _empty(inputs.shape), _empty([math.prod(inputs.shape[:-1])])
    return rms_norm_into(outputs, inputs, weight, epsilon, scales), scales


def rms_norm_into(
    outputs: paddle.Tensor,
    inputs: paddle.Tensor,
    weight: paddle.Tensor,
    epsilon: float,
    scales: paddle.Tensor | None = None,
) -> paddle.Tensor:
    """As `rms_norm`, into tensors that are there."""
    *_, width = shape = inputs.shape
    rows = math.prod(shape[:-1])
    _call("rms_norm", _threads(rows * width), rows, width, inputs, weight, epsilon, outputs, scales)
    return outputs


def rms_norm_backward(
    grads: paddle.Tensor, inputs: paddle.Tensor, weight: paddle.Tensor, scales: paddle.Tensor, weight_trains: bool
) -> tuple[paddle.Tensor, paddle.Tensor | None]:
    """Gradients of inputs [..., D] and, where it trains, of the weight [D]; `scales` as `rms_norm` gave them."""
    *_, width = shape = inputs.shape
    rows, outputs = math.prod(shape[:-1]), _empty(shape)
    threads = _threads(rows * width)
    sums = paddle.zeros([threads, width], dtype="float32") if weight_trains else None
    _call("rms_norm_backward", threads, rows, width, grads, inputs, weight, scales, outputs, sums)
    return outputs, None if sums is None else sums.sum(axis=0)


def add_bias_(states: paddle.Tensor, bias: paddle.Tensor) -> paddle.Tensor:
    """[..., D] + [D] in place."""
    *_, width = shape = states.shape
    rows = math.prod(shape[:-1])
    _call("add_bias", _threads(rows * width), rows, width, states, bias)
    return states


def quick_gelu(inputs: paddle.Tensor) -> paddle.Tensor:
    """x * sigmoid(1.702 x), [...] -> [...]."""
    outputs, count = _empty(inputs.shape), math.prod(inputs.shape)
    _call("quick_gelu", _threads(count), count, inputs, outputs)
    return outputs


def gated(gate: paddle.Tensor, up: paddle.Tensor) -> paddle.Tensor:
    """silu(gate) * up, twice [...] -> [...]."""
    outputs, count = _empty(gate.shape), math.prod(gate.shape)
    _call("gated", _threads(count), count, gate, up, outputs)
    return outputs


def gated_(gate: paddle.Tensor, up: paddle.Tensor) -> paddle.Tensor:
    """As `gated`, in the gate's place."""
    count = math.prod(gate.shape)
    _call("gated", _threads(count), count, gate, up, gate)
    return gate


def gated_backward(grads: paddle.Tensor, gate: paddle.Tensor, up: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Gradients of gate and up."""
    outputs, count = (_empty(gate.shape), _empty(gate.shape)), math.prod(gate.shape)
    _call("gated_backward", _threads(count), count, grads, gate, up, *outputs)
    return outputs


def takes_rotation(states: paddle.Tensor, cosines: paddle.Tensor, sines: paddle.Tensor) -> bool:
    """`takes` for a rotation, whose angles must be there for every row and once for all heads."""
    batch, length, _, width = states.shape
    return cosines.shape == [batch, length, 1, width] and takes(states, cosines, sines)


def rotate(states: paddle.Tensor, cosines: paddle.Tensor, sines: paddle.Tensor, back: bool = False) -> paddle.Tensor:
    """[B, L, H, E] turned by angles [B, L, 1, E], whose halves are equal; back: by the opposite angles."""
    batch, length, heads, width = shape = states.shape
    outputs, rows, sign = _empty(shape), batch * length, -1.0 if back else 1.0
    _call("rotate", _threads(math.prod(shape)), rows, heads, width, states, cosines, sines, sign, outputs)
    return outputs


def takes_attention(
    queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor, bias: paddle.Tensor | None
) -> bool:
    """`takes` for an attention, whose bias must be the same for every head: [L, S], [1 or B, 1, L, S] or None."""
    if not takes(queries, keys, values) or _gemm() is None:
        return False
    if bias is None:
        return True
    shape = bias.shape
    whole = shape[-2:] == [queries.shape[1], keys.shape[1]]
    return takes(bias) and whole and (len(shape) == 2 or (len(shape) == 4 and shape[1] == 1))


def attention(
    queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor, bias: paddle.Tensor | None, causal: bool
) -> paddle.Tensor:
    """softmax(q k^T / sqrt(E) + bias) v for every head.

    Args:
        queries: [B, L, H, E]; keys, values: [B, S, K, E] with H a multiple of K.
        bias: see `takes_attention`.
        causal: the bias hides every key behind its query, so that these need not be computed.

    Returns:
        [B, L, H, E].
    """
    sizes, outputs = _attention_sizes(queries, keys, bias, causal), _empty(queries.shape)
    threads = _threads(sizes.batch * sizes.heads * sizes.queries * sizes.keys)
    scratch = _empty([threads, sizes.block, sizes.keys])
    tensors = queries, keys, values, bias, sizes.width**-0.5, outputs, scratch
    _call("attention", threads, _gemm(), ctypes.addressof(sizes), *tensors)
    return outputs


def attention_backward(
    grads: paddle.Tensor,
    queries: paddle.Tensor,
    keys: paddle.Tensor,
    values: paddle.Tensor,
    bias: paddle.Tensor | None,
    causal: bool,
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """Gradients of queries, keys and values, from that of `attention`'s output."""
    sizes = _attention_sizes(queries, keys, bias, causal)
    threads = _threads(sizes.batch * sizes.heads * sizes.queries * sizes.keys)
    scratch = _empty([threads, 2, sizes.block, sizes.keys])
    outputs = _empty(queries.shape), *(paddle.zeros(keys.shape, dtype="float32") for _ in range(2))
    tensors = grads, queries, keys, values, bias, sizes.width**-0.5, *outputs, scratch
    _call("attention_backward", threads, _gemm(), ctypes.addressof(sizes), *tensors)
    return outputs


def attend_cached_(
    tokens: CachedTokens,
    queries: paddle.Tensor,
    keys: paddle.Tensor,
    values: paddle.Tensor,
    buffers: tuple[paddle.Tensor, paddle.Tensor],
) -> paddle.Tensor:
    """Attention of new tokens: turns queries and keys, writes keys and values into the cache's buffers.

    Args:
        queries: [B * L, H * E], overwritten with the result.
        keys, values: [B * L, K * E].
        buffers: of keys and of values, [B * K * R, E].

    Returns:
        [B * L, H * E].
    """
    tensors = queries, keys, values, *tokens.angles, *buffers, tokens.hidden, tokens.scale, tokens.scratch
    _call("attend_cached", tokens.threads, ctypes.addressof(tokens.sizes), *tensors)
    return queries


def suits_few(rows: int) -> bool:
    """Whether `matmul_few` is the fast way for so many rows: a library's product is for one, and for many."""
    return 2 <= rows <= _MOST_FEW_ROWS


def matmul_few(inputs: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor:
    """[..., in] times [in, out] for few rows; a row's numbers do not depend on the others."""
    *leading, inner = inputs.shape
    columns = weight.shape[1]
    outputs = _empty([*leading, columns])
    _call("matmul_few", _threads(inner * columns), math.prod(leading), inner, columns, inputs, weight, outputs)
    return outputs


def cross_entropy_(logits: paddle.Tensor, targets: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Losses, and right guesses (0 or 1), of rows [rows, V] with int64 targets [rows]; the logits become their
    gradients.

    Raises:
        ValueError: a target is none of the V classes.
    """
    rows, size = logits.shape
    if int(targets.min()) < 0 or int(targets.max()) >= size:
        raise ValueError(
            f"targets between {int(targets.min())} and {int(targets.max())} must be within 0 to {size - 1}"
        )
    losses, rights = _empty([rows]), paddle.empty([rows], dtype="int64")
    _call("cross_entropy", _threads(rows * size), rows, size, logits, targets, losses, rights)
    return losses, rights


def run(name: str, numbers: int, *arguments: Any) -> None:
    """Calls a kernel of another room's wrapper, which asked `takes` before.

    Args:
        name: of the function in C.
        numbers: that are computed with, for which threads are chosen.
        arguments: the function's, behind the number of threads; a tensor stands for its address.
    """
    _call(name, _threads(numbers), *arguments)


def _attention_sizes(
    queries: paddle.Tensor, keys: paddle.Tensor, bias: paddle.Tensor | None, causal: bool
) -> _AttentionSizes:
    (batch, length, heads, width), (_, key_length, key_heads, _) = queries.shape, keys.shape
    block = max(_LEAST_BLOCK, min(_BLOCK, _SCORES // key_length))
    step = 0 if bias is None or len(bias.shape) == 2 or bias.shape[0] == 1 else length * key_length
    return _AttentionSizes(batch, length, key_length, heads, key_heads, width, block, int(causal), step)


def _empty(shape: list[int]) -> paddle.Tensor:
    return paddle.empty(shape, dtype="float32")


def _threads(numbers: int) -> int:
    """Threads for so many numbers."""
    return threads_here() if numbers >= _LEAST_NUMBERS else 1


def _call(name: str, threads: int, *arguments: Any) -> None:
    """Calls a kernel; a tensor stands for its address."""
    functions = _load()[0]
    assert functions is not None, "ask takes() first"
    functions[name](threads, *(part.data_ptr() if isinstance(part, paddle.Tensor) else part for part in arguments))


@functools.cache
def _load() -> tuple[dict[str, Callable[..., None]] | None, str | None]:
    """The functions for this processor, or why there are none and what to do."""
    if not is_on(_SWITCH, os.environ):
        return None, f"{_SWITCH}=0 switches them off; unset it"
    best = _best_file()
    if best is None:
        return None, f"they were not built; install a C compiler (gcc), then {_AGAIN}"
    path = best[1]
    if openmp() is None:
        return None, "paddle's OpenMP runtime cannot be loaded; a build of paddle for x86 brings it (libs/libiomp5.so)"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path.name} cannot be loaded ({error}); {_AGAIN}"
    has_all = all(hasattr(library, name) for name in ("kernels_version", *_ARGUMENTS))
    if not has_all or library.kernels_version() != _VERSION:
        return None, f"{path.name} is of another version of paddlemix; {_AGAIN}"
    functions = {}
    for name, arguments in _ARGUMENTS.items():
        function = functions[name] = getattr(library, name)
        function.argtypes, function.restype = (_LONG, *arguments), None
    return functions, None


@functools.cache
def _best_file() -> tuple[str, Path] | None:
    """The best kind that was built and that this processor can run, and its library."""
    found = {path.name.partition(".")[0]: path for path in Path(__file__).parent.glob("_cpu_kernels_*.so")}
    has = _processor_features()
    for name, needs in _KINDS.items():
        path = found.get(f"_cpu_kernels_{name}")
        if path is not None and needs <= has:
            return name, path
    return None


def _processor_features() -> set[str]:
    """As Linux names them; empty elsewhere, which leaves the plain kind."""
    if platform.machine() != "x86_64":
        return set()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


@functools.cache
def _gemm() -> int | None:
    """Address of cblas_sgemm in the library that paddle's own products use; None where it has another."""
    for path in sorted((Path(paddle.__file__).parent / "libs").glob("lib*.so*")):
        if path.name.startswith(("libmklml", "libopenblas")):
            try:
                return ctypes.cast(ctypes.CDLL(str(path)).cblas_sgemm, ctypes.c_void_p).value
            except (OSError, AttributeError):
                continue
    return None
