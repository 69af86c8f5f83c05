"""Every written-out pass against paddle's automatic gradient of the plain formula."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import paddle
import pytest
from paddle.distributed.fleet.utils import recompute
from paddle.nn import functional

from paddlemix.models.attention import attention_bias
from paddlemix.models.kernels.attention_functions import AttentionFunction
from paddlemix.models.kernels.functions import GatedFunction, RMSNormFunction, RotaryFunction
from paddlemix.models.kernels.linear_functions import DroppedLowRankFunction, LowRankLinearFunction
from paddlemix.models.kernels.operators import Dropping
from paddlemix.models.rotary import Rope, rotary_tables
from tests.tiny_models import draw

pytestmark = pytest.mark.usefixtures("form")  # in C and in paddle's operators

TOLERANCE = 4e-6  # of the largest number
Function = Callable[..., paddle.Tensor]


def run(function: Function, arrays: Sequence[np.ndarray], trained: Sequence[bool]) -> list[np.ndarray | None]:
    """Output and the gradients of its weighted sum; None for what does not train."""
    inputs = [paddle.to_tensor(array, stop_gradient=not trains) for array, trains in zip(arrays, trained, strict=True)]
    output = function(*inputs)
    (output * paddle.to_tensor(draw(*output.shape, seed=99))).sum().backward()
    return [output.numpy(), *(part.grad.numpy() if part.grad is not None else None for part in inputs)]


def check(function: Function, plain: Function, arrays: Sequence[np.ndarray]) -> None:
    """Compares values and gradients for every choice of what trains, with recomputation too."""
    for trained in itertools.product((True, False), repeat=len(arrays)):
        if not any(trained):
            continue
        expected = run(plain, arrays, trained)
        for again in (False, True):
            found = run(_recomputed(function) if again else function, arrays, trained)
            for one, other in zip(found, expected, strict=True):
                assert (one is None) == (other is None), trained
                if one is not None and other is not None:
                    assert np.abs(one - other).max() <= TOLERANCE * np.abs(other).max(), (trained, again)


def _recomputed(function: Function) -> Function:
    layer = paddle.nn.Layer()
    layer.forward = function
    return lambda *inputs: recompute(layer, *inputs, use_reentrant=False)


def test_the_norm() -> None:
    def plain(x: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor:
        return x * paddle.rsqrt((x * x).mean(axis=-1, keepdim=True) + 1e-5) * weight

    check(lambda x, weight: RMSNormFunction.apply(x, weight, 1e-5), plain, [draw(2, 3, 8), draw(8, seed=2)])


def test_the_gate() -> None:
    arrays = [4 * draw(2, 3, 5), draw(2, 3, 5, seed=2)]
    check(GatedFunction.apply, lambda gate, up: functional.silu(gate) * up, arrays)


def test_rotary_positions() -> None:
    cosines, sines, half_turn = rotary_tables(paddle.arange(5).unsqueeze(0), 3, Rope(head_size=8), paddle.float32)

    def plain(states: paddle.Tensor) -> paddle.Tensor:
        return states * cosines + paddle.concat([-states[..., 4:], states[..., :4]], axis=-1) * sines

    check(lambda states: RotaryFunction.apply(states, cosines, sines, half_turn), plain, [draw(1, 5, 3, 8)])


def plain_attention(
    queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor, bias: paddle.Tensor | None
) -> paddle.Tensor:
    queries, keys, values = (states.transpose([0, 2, 1, 3]) for states in (queries, keys, values))
    scores = paddle.matmul(queries, keys, transpose_y=True) / math.sqrt(queries.shape[-1])
    weights = functional.softmax(scores if bias is None else scores + bias, axis=-1)
    return paddle.matmul(weights, values).transpose([0, 2, 1, 3])


@pytest.mark.parametrize(("length", "key_length"), [(2, 2), (7, 7), (8, 8), (6, 9)])
@pytest.mark.parametrize("block", [None, 1, 3, 64])
def test_causal_attention_in_blocks(length: int, key_length: int, block: int | None) -> None:
    bias = attention_bias(length, key_length, None, None)
    arrays = [2 * draw(2, length, 3, 4), 2 * draw(2, key_length, 3, 4, seed=2), draw(2, key_length, 3, 4, seed=3)]
    check(
        lambda q, k, v: AttentionFunction.apply(q, k, v, bias, block), lambda *qkv: plain_attention(*qkv, bias), arrays
    )


@pytest.mark.parametrize(("length", "key_length"), [(1, 1), (1, 5), (3, 5)])
def test_attention_without_a_mask(length: int, key_length: int) -> None:
    arrays = [2 * draw(2, length, 3, 4), 2 * draw(2, key_length, 3, 4, seed=2), draw(2, key_length, 3, 4, seed=3)]
    check(lambda *qkv: AttentionFunction.apply(*qkv, None, None), lambda *qkv: plain_attention(*qkv, None), arrays)


def test_attention_with_a_mask_for_each_row() -> None:
    segments = paddle.to_tensor([[1, 1, 2, 2, 0], [1, 1, 1, 1, 1]])
    bias = attention_bias(5, 5, segments, segments)
    arrays = [draw(2, 5, 3, 4, seed=seed) for seed in (1, 2, 3)]
    check(
        lambda q, k, v: AttentionFunction.apply(q, k, v, bias, None), lambda *qkv: plain_attention(*qkv, bias), arrays
    )


@pytest.mark.parametrize("rank", [1, 16])  # the first has gradients by narrow products, the other by one full product
def test_a_weight_with_its_update(rank: int) -> None:
    def plain(
        inputs: paddle.Tensor, weight: paddle.Tensor, first: paddle.Tensor, second: paddle.Tensor
    ) -> paddle.Tensor:
        return paddle.matmul(inputs, weight) + 0.5 * paddle.matmul(paddle.matmul(inputs, first), second)

    arrays = [draw(2, 5, 40), draw(40, 30, seed=2), draw(40, rank, seed=3), draw(rank, 30, seed=4)]
    check(lambda *inputs: LowRankLinearFunction.apply(*inputs, 0.5), plain, arrays)


@pytest.mark.parametrize("frozen", [None, 0, 1, 2])
def test_a_dropped_update_is_the_plain_formula(frozen: int | None) -> None:
    """With the same numbers drawn; also where one of the three wants no gradient."""
    arrays = [draw(2, 7, 6), draw(6, 3), draw(3, 5)]
    slope = paddle.to_tensor(draw(2, 7, 5, seed=2))

    def plain(inputs: paddle.Tensor, first: paddle.Tensor, second: paddle.Tensor) -> paddle.Tensor:
        dropped = paddle.nn.functional.dropout(inputs, 0.4, training=True)
        return paddle.matmul(paddle.matmul(dropped, first), second) * 1.5

    results = []
    for formula in (plain, lambda *tensors: DroppedLowRankFunction.apply(*tensors, 1.5, Dropping(0.4))):
        paddle.seed(3)
        tensors = [paddle.to_tensor(array, stop_gradient=place == frozen) for place, array in enumerate(arrays)]
        outputs = formula(*tensors)
        outputs.backward(slope)
        results.append([outputs.numpy(), *(tensor.grad.numpy() for tensor in tensors if not tensor.stop_gradient)])
    for expected, found in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (results[0][-1] != 0).any()
