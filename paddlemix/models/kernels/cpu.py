"""The kernels in C for float32 on CPU, where paddle's own operators are many passes, mostly on one thread.

They are in cpu_kernels.c and attention_kernels.c, for tensors that `cpu_library.is_supported`; for others, callers
compute the plain form in paddle operators.
Nothing here is recorded for a gradient: callers are backward passes of their own, or run without one.
"""

from __future__ import annotations

import ctypes
import math

import paddle

from paddlemix.models.kernels import cpu_library

_MOST_FEW_ROWS = 16  # above, a library's product is faster, although it copies the weight first
_BLOCK, _LEAST_BLOCK, _SCORES = 128, 16, 1 << 17  # queries of an attention's block; a block's scores stay in the cache


class _AttentionSizes(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_long)
        for name in ("batch", "queries", "keys", "heads", "key_heads", "width", "block", "causal", "bias_step")
    ]


class _CachedSizes(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_long) for name in ("batch", "tokens", "heads", "key_heads", "width", "room", "held", "window")
    ]


class CachedTokens:
    """What `attend_cached_` needs to know of new tokens after a cache, for all layers.

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
        # Structures are passed by address, so they live as long as this object does.
        self.sizes = _CachedSizes(batch, self.count, *heads, width, room, held, window or room)
        self.angles, self.hidden, self.scale = angles, hidden, width**-0.5
        self.threads = cpu_library.threads(batch * self.count * heads[0] * width * (held + self.count))
        self.scratch = _empty([self.threads, room + width])


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
    """As `rms_norm`, into existing tensors."""
    *_, width = shape = inputs.shape
    rows = math.prod(shape[:-1])
    cpu_library.run("rms_norm", rows * width, rows, width, inputs, weight, epsilon, outputs, scales)
    return outputs


def rms_norm_backward(
    grads: paddle.Tensor, inputs: paddle.Tensor, weight: paddle.Tensor, scales: paddle.Tensor, weight_trains: bool
) -> tuple[paddle.Tensor, paddle.Tensor | None]:
    """Gradients of inputs [..., D] and, where it trains, of the weight [D]; `scales` as `rms_norm` returned them."""
    *_, width = shape = inputs.shape
    rows, outputs = math.prod(shape[:-1]), _empty(shape)
    threads = cpu_library.threads(rows * width)
    # a row of sums per thread: adding to one from all threads would need locks, and its last bit depend on their order
    sums = paddle.zeros([threads, width], dtype="float32") if weight_trains else None
    cpu_library.call("rms_norm_backward", threads, rows, width, grads, inputs, weight, scales, outputs, sums)
    return outputs, None if sums is None else sums.sum(axis=0)


def add_bias_(states: paddle.Tensor, bias: paddle.Tensor) -> paddle.Tensor:
    """[..., D] + [D] in place."""
    *_, width = shape = states.shape
    rows = math.prod(shape[:-1])
    cpu_library.run("add_bias", rows * width, rows, width, states, bias)
    return states


def quick_gelu(inputs: paddle.Tensor) -> paddle.Tensor:
    """x * sigmoid(1.702 x), [...] -> [...]."""
    outputs, count = _empty(inputs.shape), math.prod(inputs.shape)
    cpu_library.run("quick_gelu", count, count, inputs, outputs)
    return outputs


def gated(gate: paddle.Tensor, up: paddle.Tensor) -> paddle.Tensor:
    """silu(gate) * up, twice [...] -> [...]."""
    outputs, count = _empty(gate.shape), math.prod(gate.shape)
    cpu_library.run("gated", count, count, gate, up, outputs)
    return outputs


def gated_(gate: paddle.Tensor, up: paddle.Tensor) -> paddle.Tensor:
    """As `gated`, in the gate's place."""
    count = math.prod(gate.shape)
    cpu_library.run("gated", count, count, gate, up, gate)
    return gate


def gated_backward(grads: paddle.Tensor, gate: paddle.Tensor, up: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Gradients of gate and up."""
    outputs, count = (_empty(gate.shape), _empty(gate.shape)), math.prod(gate.shape)
    cpu_library.run("gated_backward", count, count, grads, gate, up, *outputs)
    return outputs


def supports_rotation(states: paddle.Tensor, cosines: paddle.Tensor, sines: paddle.Tensor) -> bool:
    """`is_supported` for a rotation, whose angles must be given for every row and once for all heads."""
    batch, length, _, width = states.shape
    return cosines.shape == [batch, length, 1, width] and cpu_library.is_supported(states, cosines, sines)


def rotate(states: paddle.Tensor, cosines: paddle.Tensor, sines: paddle.Tensor, back: bool = False) -> paddle.Tensor:
    """[B, L, H, E] turned by angles [B, L, 1, E], whose halves are equal; back: by the opposite angles."""
    batch, length, heads, width = shape = states.shape
    outputs, rows, sign = _empty(shape), batch * length, -1.0 if back else 1.0
    cpu_library.run("rotate", math.prod(shape), rows, heads, width, states, cosines, sines, sign, outputs)
    return outputs


def supports_attention(
    queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor, bias: paddle.Tensor | None
) -> bool:
    """`is_supported` for an attention, whose bias must serve every head: [L, S], [1 or B, 1, L, S] or None."""
    if not cpu_library.supports_products(queries, keys, values):
        return False
    if bias is None:
        return True
    shape = bias.shape
    whole = shape[-2:] == [queries.shape[1], keys.shape[1]]
    return cpu_library.is_supported(bias) and whole and (len(shape) == 2 or (len(shape) == 4 and shape[1] == 1))


def attention(
    queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor, bias: paddle.Tensor | None, causal: bool
) -> paddle.Tensor:
    """softmax(q k^T / sqrt(E) + bias) v for every head.

    Args:
        queries: [B, L, H, E]; keys, values: [B, S, K, E] with H a multiple of K.
        bias: see `supports_attention`.
        causal: the bias hides every key after its query, so that these need not be computed.

    Returns:
        [B, L, H, E].
    """
    sizes, outputs = _attention_sizes(queries, keys, bias, causal), _empty(queries.shape)
    threads = cpu_library.threads(sizes.batch * sizes.heads * sizes.queries * sizes.keys)
    # one block of scores for each thread, never [H, L, S]
    scratch = _empty([threads, sizes.block, sizes.keys])
    tensors = queries, keys, values, bias, sizes.width**-0.5, outputs, scratch
    cpu_library.call("attention", threads, cpu_library.gemm(), ctypes.addressof(sizes), *tensors)
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
    threads = cpu_library.threads(sizes.batch * sizes.heads * sizes.queries * sizes.keys)
    # weights and their gradients of one block for each thread: the weights are computed again
    scratch = _empty([threads, 2, sizes.block, sizes.keys])
    # Gradients of keys and values are sums over query blocks, hence begin as zeros.
    outputs = _empty(queries.shape), *(paddle.zeros(keys.shape, dtype="float32") for _ in range(2))
    tensors = grads, queries, keys, values, bias, sizes.width**-0.5, *outputs, scratch
    cpu_library.call("attention_backward", threads, cpu_library.gemm(), ctypes.addressof(sizes), *tensors)
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
    # The result takes the place of the queries: each of them is read once, before its own result is written.
    tensors = queries, keys, values, *tokens.angles, *buffers, tokens.hidden, tokens.scale, tokens.scratch
    cpu_library.call("attend_cached", tokens.threads, ctypes.addressof(tokens.sizes), *tensors)
    return queries


def supports_few_rows(rows: int) -> bool:
    """Whether `matmul_few` is the fast way for this many rows: a library's product is for one, and for many."""
    return 2 <= rows <= _MOST_FEW_ROWS


def matmul_few(inputs: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor:
    """[..., in] times [in, out] for few rows; a row's numbers do not depend on the others."""
    *leading, inner = inputs.shape
    columns = weight.shape[1]
    outputs = _empty([*leading, columns])
    cpu_library.run("matmul_few", inner * columns, math.prod(leading), inner, columns, inputs, weight, outputs)
    return outputs


def add_outer_(total: paddle.Tensor, left: paddle.Tensor, right: paddle.Tensor) -> None:
    """total [a, b] += left^T right, of [rows, a] and [rows, b]."""
    (rows, width), columns = left.shape, right.shape[1]
    arguments = cpu_library.gemm(), left, right, total
    cpu_library.run("add_outer", rows * columns, rows, width, columns, *arguments)


def cross_entropy_(logits: paddle.Tensor, targets: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Losses, and right guesses (0 or 1), of rows [rows, V] with int64 targets [rows]; the logits become their
    gradients.

    Raises:
        ValueError: a target is not one of the V classes.
    """
    rows, size = logits.shape
    # C would read outside the row.
    if int(targets.min()) < 0 or int(targets.max()) >= size:
        raise ValueError(
            f"targets between {int(targets.min())} and {int(targets.max())} must be within 0 to {size - 1}"
        )
    losses, rights = _empty([rows]), paddle.empty([rows], dtype="int64")
    cpu_library.run("cross_entropy", rows * size, rows, size, logits, targets, losses, rights)
    return losses, rights


def _attention_sizes(
    queries: paddle.Tensor, keys: paddle.Tensor, bias: paddle.Tensor | None, causal: bool
) -> _AttentionSizes:
    (batch, length, heads, width), (_, key_length, key_heads, _) = queries.shape, keys.shape
    # scores of a block stay in the cache: fewer queries at a time, the more keys there are
    block = max(_LEAST_BLOCK, min(_BLOCK, _SCORES // key_length))
    # floats from one row's bias to the next; 0 where all rows share one
    step = 0 if bias is None or len(bias.shape) == 2 or bias.shape[0] == 1 else length * key_length
    return _AttentionSizes(batch, length, key_length, heads, key_heads, width, block, int(causal), step)


def _empty(shape: list[int]) -> paddle.Tensor:
    return paddle.empty(shape, dtype="float32")
