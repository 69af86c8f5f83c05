"""Linear layers behind a norm or a gate: values and gradients of the layers one by one, and less kept for them."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import paddle
import pytest
from paddle.distributed.fleet.utils import recompute

from paddlemix.models.kernels import cpu_library
from paddlemix.models.layers import RMSNorm, swiglu_linear
from paddlemix.models.layers import linear as build_linear
from tests.tiny_models import draw, randomise

Group = Callable[[list[paddle.nn.Layer], list[paddle.Tensor]], list[paddle.Tensor]]


def normed(layers: list[paddle.nn.Layer], inputs: list[paddle.Tensor]) -> list[paddle.Tensor]:
    norm, *linears = layers
    assert isinstance(norm, RMSNorm)
    return norm.deferred(inputs[0]).linears(*linears)


def gated(layers: list[paddle.nn.Layer], inputs: list[paddle.Tensor]) -> list[paddle.Tensor]:
    return [swiglu_linear(layers[1], *inputs)]


def parts(bias: bool = False) -> list[paddle.nn.Layer]:
    return [randomise(part) for part in (RMSNorm(9, 1e-5), build_linear(9, 21, 0.1, bias), build_linear(9, 5, 0.1))]


def results(group: Group, layers: list[paddle.nn.Layer], frozen: tuple[str, ...], again: bool) -> list[np.ndarray]:
    """Outputs, then the gradients of inputs and weights that train."""
    inputs = [paddle.to_tensor(draw(2, 7, 9, seed=seed), stop_gradient="inputs" in frozen) for seed in (1, 2)]
    weights = {f"{place}.{name}": part for place, layer in enumerate(layers) for name, part in layer.named_parameters()}
    for name, weight in weights.items():
        weight.stop_gradient, weight.grad = name in frozen, None
    outputs = recompute(group, layers, inputs, use_reentrant=False) if again else group(layers, inputs)
    slopes = [paddle.to_tensor(draw(*part.shape, seed=5)) for part in outputs]
    sum((part * slope).sum() for part, slope in zip(outputs, slopes, strict=True)).backward()
    grads = [part.grad for part in (*inputs, *weights.values()) if part.grad is not None]
    return [part.detach().numpy() for part in (*outputs, *grads)]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "frozen",
    [(), ("inputs",), ("0.weight",), ("1.weight",), ("1.weight", "2.weight"), ("inputs", "0.weight")],
    ids="+".join,
)
@pytest.mark.parametrize("group", [normed, gated])
def test_values_and_gradients_are_those_of_the_layers(
    group: Group, frozen: tuple[str, ...], bias: bool, again: bool
) -> None:
    if group is gated and {"inputs", "1.weight"} <= set(frozen):
        pytest.fail("a case in which nothing trains shows nothing")
    found = results(group, parts(bias), frozen, again)
    with cpu_library.switched_off():
        expected = results(group, parts(bias), frozen, again=False)
    assert len(found) == len(expected) > (2 if group is normed else 1)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("group", [normed, gated])
def test_what_stands_between_is_not_kept(group: Group) -> None:
    layers = [randomise(part) for part in (RMSNorm(64, 1e-5), build_linear(64, 8, 0.1))]
    inputs = [paddle.to_tensor(draw(1, 500, 64, seed=seed), stop_gradient=False) for seed in (1, 2)]

    def kept() -> int:
        gc.collect()
        before = paddle.base.core.host_memory_stat_current_value("Allocated", 0)
        outputs = group(layers, inputs)
        after = paddle.base.core.host_memory_stat_current_value("Allocated", 0)
        return after - before - sum(part.size * 4 for part in outputs)

    with cpu_library.switched_off():
        plain = kept()
    assert plain >= 4 * 500 * 64 and kept() <= plain - 4 * 500 * 64
