"""Attention with its forward and backward pass written out, by the rules of functions.py."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import paddle
from paddle.autograd import PyLayer
from paddle.nn import functional

from paddlemix.models.kernels import cpu
from paddlemix.models.kernels.functions import only, trains
from paddlemix.models.kernels.operators import row_sums
from paddlemix.models.kernels.threads import cores, map_on_cores

_LEAST_SCORES = 1 << 18  # below this many, handing a share to another thread takes longer than computing it


class AttentionFunction(PyLayer):
    """softmax(q k^T / sqrt(E) + bias) v for every head, the softmax in float32.

    Of causal scores only the blocks that hold a visible key are computed: `block` queries at a time with the keys up to
    the last of them.  On CPU the heads are shared out among the cores.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: paddle.Tensor,
        keys: paddle.Tensor,
        values: paddle.Tensor,
        bias: paddle.Tensor | None,
        block: int | None,
    ) -> paddle.Tensor:
        """[B, L, H, E], twice [B, S, H, E] -> [B, L, H, E].  The kernels in C accept fewer heads of keys and values.

        Args:
            bias: float32, broadcast to [B, H, L, S]; None adds nothing.
            block: queries of a block, where the bias is [L, S] and hides every key after its query; None for all at
                once.
        """
        ctx.trains, ctx.num_biases = trains(queries, keys, values), int(bias is not None)
        ctx.compiled, ctx.causal = cpu.supports_attention(queries, keys, values, bias), block is not None
        # C keeps the inputs alone and computes the weights again; paddle's operators are slow at that and keep them.
        if ctx.compiled:
            ctx.save_for_backward(queries, keys, values, *([] if bias is None else [bias]))
            return cpu.attention(queries, keys, values, bias, ctx.causal)
        # The mask of a block is cut once for all heads; a bias for every row of the batch comes with one block alone.
        length, key_length, heads = queries.shape[1], keys.shape[1], queries.shape[2]
        ctx.blocks = _causal_blocks(length, key_length, block)
        ctx.heads = _share_heads(heads, queries.shape[0] * length * key_length)
        biases = [bias if len(ctx.blocks) == 1 or bias is None else bias[i:j, :end] for i, j, end in ctx.blocks]
        share = functools.partial(_attend, blocks=ctx.blocks, biases=biases, zero_hidden=block is not None)
        shares = map_on_cores(share, *(_split_heads(states, ctx.heads) for states in (queries, keys, values)))
        output = _join_heads([result[0] for result in shares])
        # the output is kept for the next layer anyway; detached, because the output itself holds what is kept here
        ctx.save_for_backward(output.detach(), *(kept for result in shares for kept in result[1:]))
        return output

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        """Gradients of queries, keys and values; None for a bias."""
        if ctx.compiled:
            queries, keys, values, *biases = ctx.saved_tensor()
            found = cpu.attention_backward(
                grad.contiguous(), queries, keys, values, biases[0] if biases else None, ctx.causal
            )
            return (*only(ctx.trains, *found), *[None] * ctx.num_biases)
        output, *kept = ctx.saved_tensor()
        size = 3 + len(ctx.blocks)
        share = functools.partial(_attend_backward, blocks=ctx.blocks)
        outputs, grads = _split_heads(output, ctx.heads), _split_heads(grad, ctx.heads)
        shares = map_on_cores(share, grads, outputs, (kept[i : i + size] for i in range(0, len(kept), size)))
        joined = (_join_heads(parts) for parts in zip(*shares, strict=True))
        return (*only(ctx.trains, *joined), *[None] * ctx.num_biases)


def _share_heads(heads: int, scores: int) -> list[int]:
    """Heads of each core's share; one share of all where there is little to compute (`scores` per head)."""
    count = min(cores(), heads) if heads * scores >= _LEAST_SCORES else 1
    return [heads * (i + 1) // count - heads * i // count for i in range(count)]


def _split_heads(states: paddle.Tensor, heads: Sequence[int]) -> list[paddle.Tensor]:
    return [states] if len(heads) == 1 else states.split(list(heads), axis=2)


def _join_heads(parts: Sequence[paddle.Tensor]) -> paddle.Tensor:
    return parts[0] if len(parts) == 1 else paddle.concat(list(parts), axis=2)


def _attend(
    queries: paddle.Tensor,
    keys: paddle.Tensor,
    values: paddle.Tensor,
    blocks: list[tuple[int, int, int]],
    biases: list[paddle.Tensor | None],
    zero_hidden: bool,
) -> list[paddle.Tensor]:
    """Output, then what its backward pass needs: scaled queries, keys, values and the weights of each block.

    Args:
        queries, keys, values: as of `AttentionFunction`, some of its heads.
        zero_hidden: set the weights of hidden keys to 0.  Paddle's softmax on CPU returns exp(-64), whose products
            in the backward pass are subnormal numbers, and a matrix product over these takes twenty times as long.
    """
    # [B, H, L or S, E]; copies, because recomputation returns saved views without their strides
    # Scaling the queries costs L * E products where scaling the scores would cost L * S.
    scaled = queries.transpose([0, 2, 1, 3]).contiguous() * (1.0 / math.sqrt(queries.shape[-1]))
    keys, values = (part.transpose([0, 2, 1, 3]).contiguous() for part in (keys, values))
    weights, merged = [], []
    for (start, stop, end), bias in zip(blocks, biases, strict=True):
        scores = paddle.matmul(scaled[:, :, start:stop], keys[:, :, :end], transpose_y=True).astype("float32")
        if bias is not None:
            scores.add_(bias)
        scores = functional.softmax_(scores, axis=-1)
        if bias is not None and zero_hidden:
            scores.multiply_((bias >= 0).astype("float32"))
        weights.append(scores.astype(values.dtype))
        merged.append(paddle.matmul(weights[-1], values[:, :, :end]))
    output = (merged[0] if len(merged) == 1 else paddle.concat(merged, axis=2)).transpose([0, 2, 1, 3]).contiguous()
    return [output, scaled, keys, values, *weights]


def _attend_backward(
    grad: paddle.Tensor, output: paddle.Tensor, kept: list[paddle.Tensor], blocks: list[tuple[int, int, int]]
) -> list[paddle.Tensor]:
    """Gradients of queries, keys and values of some heads, from `_attend`'s output, its gradient and what it kept."""
    queries, keys, values, *weights = kept
    size, means = grad.shape[-1], None
    if values.dtype == paddle.float32:
        # [B, H, L, 1]: the weights' gradients, averaged by the weights, which equals the row sums of gradient * output;
        # these are E wide and not S.
        means = row_sums((grad * output).astype("float32")).transpose([0, 2, 1, 3])
    grad = grad.transpose([0, 2, 1, 3])  # [B, H, L, E]
    parts: list[list[paddle.Tensor]] = [[], [], []]
    for (start, stop, end), weight in zip(blocks, weights, strict=True):
        part = grad[:, :, start:stop]
        scores_grad = paddle.matmul(part, values[:, :, :end], transpose_y=True).astype("float32")
        if means is not None:
            scores_grad.subtract_(means[:, :, start:stop]).multiply_(weight.astype("float32"))
        else:
            _center_(scores_grad, weight.astype("float32"))
        # in the type of the products that follow; the softmax itself stays in float32
        scores_grad = scores_grad.astype(queries.dtype)
        parts[0].append(paddle.matmul(scores_grad, keys[:, :, :end]))
        parts[1].append(paddle.matmul(scores_grad, queries[:, :, start:stop], transpose_x=True))
        parts[2].append(paddle.matmul(weight, part, transpose_x=True))
    queries_grad = (parts[0][0] if len(weights) == 1 else paddle.concat(parts[0], axis=2)).scale_(1.0 / math.sqrt(size))
    return [part.transpose([0, 2, 1, 3]) for part in (queries_grad, _sum_prefixes(parts[1]), _sum_prefixes(parts[2]))]


def _center_(grads: paddle.Tensor, weights: paddle.Tensor) -> None:
    """grads -> weights * (grads - sum(weights * grads)) of each row, in place; the weights are overwritten.

    In half precision the sum is one of the rounded `grads` themselves, so that what rounding has in common cancels.
    The mean by gradient and output, whose rounding is another, leaves gradients of queries and keys with 1.2 times the
    error (normal numbers) to 2.1 times (values around 20), and with float32 factors still with 1.15 to 1.8 times.
    """
    grads.multiply_(weights)
    grads.subtract_(weights.multiply_(row_sums(grads)))


def _causal_blocks(length: int, key_length: int, block: int | None) -> list[tuple[int, int, int]]:
    """(first query, query after the last, keys that the last sees) of each block; all blocks of nearly one size."""
    # A query in the last block sees all keys; the first block sees those before the rows plus its own.
    count = 1 if block is None else max(1, round(length / block))
    stops = [length * number // count for number in range(count + 1)]
    seen = key_length - length
    return [
        (start, stop, key_length if count == 1 else seen + stop) for start, stop in zip(stops, stops[1:], strict=False)
    ]


def _sum_prefixes(parts: list[paddle.Tensor]) -> paddle.Tensor:
    """Sum of [B, H, s, E] of growing s, each aligned with the beginning of the last."""
    # Block i sees the first keys only: its share is added to the beginning of the longest, the last.
    total = parts[-1]
    for part in parts[:-1]:
        missing = total.shape[2] - part.shape[2]
        total.add_(functional.pad(part, [0, 0, 0, 0, 0, missing, 0, 0], pad_from_left_axis=True))
    return total
