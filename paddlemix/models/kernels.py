"""Forward and backward passes written out where paddle's automatic ones are slow or keep too much.

Each equals the plain formula in its docstring; tests compare values and gradients.  What is gained, mostly on CPU:
reductions are products with ones, results are written in place, and less is kept for the backward pass.
None of them has a second derivative.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import paddle
from paddle.autograd import PyLayer
from paddle.nn import functional

from paddlemix.models import compiled
from paddlemix.models.parallel import cores, map_on_cores

NARROW_COST = 3  # a product with a factor of few columns runs at about a third of the rate


def _trains(*tensors: paddle.Tensor) -> tuple[bool, ...]:
    """Which of a function's inputs need a gradient: paddle takes none for the others.  To be asked in the forward pass,
    because recomputation gives back other tensors than were saved."""
    return tuple(not tensor.stop_gradient for tensor in tensors)


def _only(wanted: tuple[bool, ...], *grads: paddle.Tensor | None) -> tuple[paddle.Tensor | None, ...]:
    return tuple(grad if want else None for want, grad in zip(wanted, grads, strict=True))


def _spread(column: paddle.Tensor, width: int) -> paddle.Tensor:
    """[rows, 1] as a factor of [rows, width].  On CPU a product with ones: broadcasting takes three times as long."""
    if column.dtype != paddle.float32 or not column.place.is_cpu_place():
        return column
    return paddle.matmul(column, paddle.ones([1, width]))


def _repeat(row: paddle.Tensor, rows: int) -> paddle.Tensor:
    """[width] as a factor of [rows, width], see `_spread`."""
    if row.dtype != paddle.float32 or not row.place.is_cpu_place():
        return row
    return paddle.matmul(paddle.ones([rows, 1]), row.unsqueeze(0))


class RMSNormFunction(PyLayer):
    """x / sqrt(mean(x^2) + epsilon) * weight, computed in float32."""

    @staticmethod
    def forward(ctx: Any, inputs: paddle.Tensor, weight: paddle.Tensor, epsilon: float) -> paddle.Tensor:
        """[..., D], [D] -> [..., D] of the inputs' dtype."""
        width = inputs.shape[-1]
        ctx.trains, ctx.compiled = _trains(inputs, weight), compiled.takes(inputs, weight)
        if ctx.compiled:
            outputs, scales = compiled.rms_norm(inputs, weight, epsilon)
            ctx.save_for_backward(inputs, scales, weight)
            return outputs
        flat = inputs.reshape([-1, width]).astype("float32")
        ones = paddle.ones([width, 1], dtype="float32")
        scale = paddle.rsqrt(paddle.matmul(flat * flat, ones) * (1.0 / width) + epsilon)  # [rows, 1]
        normalised = flat * _spread(scale, width)
        ctx.save_for_backward(normalised, scale, weight)
        ctx.shape, ctx.dtype = inputs.shape, inputs.dtype
        return (normalised.astype(inputs.dtype) * _repeat(weight, len(flat))).reshape(inputs.shape)

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        """Gradients of inputs and weight."""
        normalised, scale, weight = ctx.saved_tensor()
        if ctx.compiled:
            grads = compiled.rms_norm_backward(grad.contiguous(), normalised, weight, scale, ctx.trains[1])
            return _only(ctx.trains, *grads)
        rows, width = normalised.shape
        flat = grad.reshape([rows, width]).astype("float32")
        through = flat * _repeat(weight.astype("float32"), rows)
        mean = paddle.matmul(through * normalised, paddle.ones([width, 1], dtype="float32")) * (1.0 / width)
        inputs_grad = through.subtract_(normalised * _spread(mean, width)).multiply_(_spread(scale, width))
        inputs_grad = inputs_grad.astype(ctx.dtype).reshape(ctx.shape)
        weight_grad = None
        if ctx.trains[1]:
            weight_grad = paddle.matmul(paddle.ones([1, rows], dtype="float32"), flat * normalised).reshape([width])
            weight_grad = weight_grad.astype(weight.dtype)
        return _only(ctx.trains, inputs_grad, weight_grad)


class GatedFunction(PyLayer):
    """silu(gate) * up, where silu(x) = x * sigmoid(x)."""

    @staticmethod
    def forward(ctx: Any, gate: paddle.Tensor, up: paddle.Tensor) -> paddle.Tensor:
        """Twice [..., D] -> [..., D]."""
        ctx.trains = _trains(gate, up)
        ctx.save_for_backward(gate, up)
        if compiled.takes(gate, up):
            return compiled.gated(gate, up)
        return functional.silu(gate).multiply_(up)

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        """Gradients of gate and up."""
        gate, up = ctx.saved_tensor()
        if compiled.takes(grad, gate, up):
            return _only(ctx.trains, *compiled.gated_backward(grad, gate, up))
        sigmoid = functional.sigmoid(gate)
        active = gate * sigmoid
        up_grad = grad * active
        # silu'(x) = sigmoid * (1 + x - active)
        slope = (gate - active).scale_(1.0, 1.0).multiply_(sigmoid)
        return _only(ctx.trains, slope.multiply_(grad).multiply_(up), up_grad)


class RotaryFunction(PyLayer):
    """x * cosines + (x @ half_turn) * sines.  Keeps the tables alone, which all layers share."""

    @staticmethod
    def forward(
        ctx: Any, states: paddle.Tensor, cosines: paddle.Tensor, sines: paddle.Tensor, half_turn: paddle.Tensor
    ) -> paddle.Tensor:
        """[B, L, H, E] three times and [E, E] -> [B, L, H, E]."""
        ctx.save_for_backward(cosines, sines, half_turn)
        if compiled.takes_rotation(states, cosines, sines):
            return compiled.rotate(states, cosines, sines)
        return (states * cosines).add_(paddle.matmul(states, half_turn).multiply_(sines))

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        """Gradient of the states."""
        cosines, sines, half_turn = ctx.saved_tensor()
        if compiled.takes_rotation(grad, cosines, sines):
            return compiled.rotate(grad, cosines, sines, back=True), None, None, None
        turned = paddle.matmul(grad * sines, half_turn, transpose_y=True)
        return (grad * cosines).add_(turned), None, None, None


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
        """[B, L, H, E], twice [B, S, H, E] -> [B, L, H, E].  Compiled kernels take fewer heads of keys and values.

        Args:
            bias: float32, broadcast to [B, H, L, S]; None adds nothing.
            block: queries of a block, where the bias is [L, S] and hides every key behind its query; None for all at
                once.
        """
        ctx.trains, ctx.num_biases = _trains(queries, keys, values), int(bias is not None)
        ctx.compiled, ctx.causal = compiled.takes_attention(queries, keys, values, bias), block is not None
        if ctx.compiled:
            ctx.save_for_backward(queries, keys, values, *([] if bias is None else [bias]))
            return compiled.attention(queries, keys, values, bias, ctx.causal)
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
            found = compiled.attention_backward(
                grad.contiguous(), queries, keys, values, biases[0] if biases else None, ctx.causal
            )
            return (*_only(ctx.trains, *found), *[None] * ctx.num_biases)
        output, *kept = ctx.saved_tensor()
        size = 3 + len(ctx.blocks)
        share = functools.partial(_attend_backward, blocks=ctx.blocks)
        outputs, grads = _split_heads(output, ctx.heads), _split_heads(grad, ctx.heads)
        shares = map_on_cores(share, grads, outputs, (kept[i : i + size] for i in range(0, len(kept), size)))
        joined = (_join_heads(parts) for parts in zip(*shares, strict=True))
        return (*_only(ctx.trains, *joined), *[None] * ctx.num_biases)


_LEAST_SCORES = 1 << 18  # below so many, handing a share over to another thread takes longer than computing it


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
        zero_hidden: give hidden keys the weight 0.  Paddle's softmax on CPU gives exp(-64), whose products in the
            backward pass are subnormal numbers, and a product of matrices that meets these takes twenty times as long.
    """
    # [B, H, L or S, E]; copies, because recomputation gives saved views back without their strides
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
    size = grad.shape[-1]
    # [B, H, L, 1]: the weights' gradients, averaged by the weights
    means = paddle.matmul((grad * output).astype("float32"), paddle.ones([size, 1])).transpose([0, 2, 1, 3])
    grad = grad.transpose([0, 2, 1, 3])  # [B, H, L, E]
    parts: list[list[paddle.Tensor]] = [[], [], []]
    for (start, stop, end), weight in zip(blocks, weights, strict=True):
        part = grad[:, :, start:stop]
        scores_grad = paddle.matmul(part, values[:, :, :end], transpose_y=True).astype("float32")
        scores_grad.subtract_(means[:, :, start:stop]).multiply_(weight.astype("float32"))
        scores_grad = scores_grad.astype(queries.dtype)
        parts[0].append(paddle.matmul(scores_grad, keys[:, :, :end]))
        parts[1].append(paddle.matmul(scores_grad, queries[:, :, start:stop], transpose_x=True))
        parts[2].append(paddle.matmul(weight, part, transpose_x=True))
    queries_grad = (parts[0][0] if len(weights) == 1 else paddle.concat(parts[0], axis=2)).scale_(1.0 / math.sqrt(size))
    return [part.transpose([0, 2, 1, 3]) for part in (queries_grad, _sum_prefixes(parts[1]), _sum_prefixes(parts[2]))]


def _causal_blocks(length: int, key_length: int, block: int | None) -> list[tuple[int, int, int]]:
    """(first query, query behind the last, keys that the last sees) of each block; all blocks of nearly one size."""
    count = 1 if block is None else max(1, round(length / block))
    stops = [length * number // count for number in range(count + 1)]
    seen = key_length - length
    return [
        (start, stop, key_length if count == 1 else seen + stop) for start, stop in zip(stops, stops[1:], strict=False)
    ]


def _sum_prefixes(parts: list[paddle.Tensor]) -> paddle.Tensor:
    """Sum of [B, H, s, E] of growing s, each standing at the beginning of the last."""
    total = parts[-1]
    for part in parts[:-1]:
        missing = total.shape[2] - part.shape[2]
        total.add_(functional.pad(part, [0, 0, 0, 0, 0, missing, 0, 0], pad_from_left_axis=True))
    return total


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
        ctx.scaling, ctx.trains = scaling, _trains(inputs, weight, first, second)
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
        return _only(ctx.trains, inputs_grad, weight_grad, first_grad, second_grad)
