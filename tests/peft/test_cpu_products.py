"""Codes multiplied and made wide in C against the formats in numpy and the layer's plain form."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from paddle.base import core

from paddlemix.models.kernels import cpu_library
from paddlemix.peft import cpu_products, quantized_linear
from paddlemix.peft.quantized_linear import QuantizedLinear
from paddlemix.peft.quantized_weight import QuantizedWeight, padded_size, stored_arrays
from tests.peft.test_quantize import make_layer, plain_dequantized
from tests.tiny_models import draw

# in, out: below and above a vector, a block and a piece, no multiple of any of them nor of 2
SHAPES = [(1, 1), (15, 2), (63, 3), (64, 4), (65, 70), (100, 33), (130, 7), (512, 5), (577, 9), (1100, 6)]
BUILT = pytest.mark.usefixtures("kernels")


def draw_weight(kind: str, shape: tuple[int, int], seed: int = 0) -> QuantizedWeight:
    """Every code there can be, also of the scales and in what fills a block up."""
    random = np.random.default_rng(seed)
    arrays = {}
    for name, (dtype, size) in stored_arrays(kind, *shape).items():
        if dtype == np.float32:
            arrays[name] = random.uniform(0.01, 1.0, size).astype(np.float32)
        else:
            limits = np.iinfo(dtype)
            arrays[name] = random.integers(limits.min, limits.max, size, dtype, endpoint=True)
    return QuantizedWeight(kind, shape, arrays)


def fill_layer(weight: QuantizedWeight) -> QuantizedLinear:
    layer = QuantizedLinear(weight.kind, weight.shape)
    layer.fill(weight)
    return layer


def wide(layer: QuantizedLinear, scaled: bool) -> bytes:
    """All pieces, one behind the other."""
    return b"".join(rows.numpy().tobytes() for _, rows in layer.wide_rows(paddle.float32, scaled))


def assert_near(found: np.ndarray, expected: np.ndarray) -> None:
    """To rounding of sums in another order."""
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_wide_weights_are_those_of_the_format(
    kind: str, library: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, at once and in pieces whose last is shorter, with and without the scales of outputs."""
    for shape in SHAPES:
        weight = draw_weight(kind, shape)
        layer, expected = fill_layer(weight), plain_dequantized(weight)
        assert cpu_products.can_decode(kind, layer._buffers)
        assert layer.dequantized().numpy().tobytes() == np.ascontiguousarray(expected).tobytes()
        with cpu_library.switched_off():
            unscaled = wide(layer, scaled=False)
        for rows in (1000, 4):
            monkeypatch.setattr(quantized_linear, "_WIDE_BYTES", rows * 4 * padded_size(shape[0]))
            assert wide(layer, scaled=True) == expected.T.tobytes()
            assert wide(layer, scaled=False) == unscaled


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_products_of_few_rows_are_those_of_the_wide_weight(kind: str, library: tuple[str, int]) -> None:
    for number, shape in enumerate(SHAPES):
        weight = draw_weight(kind, shape, number)
        layer, expected = fill_layer(weight), plain_dequantized(weight).astype(np.float64)
        for rows in (*range(1, 18), 35, 48, 49):
            inputs = draw(rows, shape[0], seed=rows)
            states = paddle.to_tensor(inputs)
            assert cpu_products.is_faster(kind, layer._buffers, states) is (rows <= 48)
            found = layer(states).numpy()
            assert_near(found, inputs @ expected)
            with cpu_library.switched_off():
                assert_near(found, layer(states).numpy())


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_rows_bits_depend_on_nothing_else(
    kind: str, library: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither on the rows beside it nor on the number of threads."""
    layer, states = fill_layer(draw_weight(kind, (600, 37))), paddle.to_tensor(draw(7, 600))
    together = layer(states).numpy()
    for threads in ("1", "2", "5"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        alone = [layer(states[row : row + 1]).numpy() for row in range(7)]
        assert np.concatenate(alone).tobytes() == together.tobytes()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_what_is_not_finite_stays_in_its_row(kind: str, library: tuple[str, int]) -> None:
    layer, inputs = fill_layer(draw_weight(kind, (70, 5))), draw(4, 70)
    inputs[1, 69], inputs[2, 3] = np.nan, np.inf
    found = layer(paddle.to_tensor(inputs)).numpy()
    assert np.isfinite(found[[0, 3]]).all()
    assert np.isnan(found[1]).all() and not np.isfinite(found[2]).any()


@pytest.mark.parametrize("rows", [3, 16, 60])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_gradients_are_those_of_the_plain_form(
    kind: str, rows: int, library: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces, which are written one over the other."""
    monkeypatch.setattr(quantized_linear, "_WIDE_BYTES", 4 * 128 * 5)
    layer, results = make_layer(kind, draw(100, 33), draw(33, seed=3)), []
    for _ in range(2):
        inputs = paddle.to_tensor(draw(rows, 100, seed=2), stop_gradient=False)
        outputs = layer(inputs)
        (outputs * paddle.to_tensor(draw(rows, 33, seed=4))).sum().backward()
        results.append((outputs.numpy(), inputs.grad.numpy(), layer.bias.grad.numpy()))
        layer.clear_gradients()
        monkeypatch.setattr(cpu_library, "_switched_off", True)
    for found, expected in zip(*results, strict=True):
        assert_near(found, expected)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_inputs_of_another_type_are_computed_in_the_plain_form(kind: str, form: str) -> None:
    layer, states = make_layer(kind, draw(64, 9)), paddle.to_tensor(draw(3, 64)).astype("float64")
    assert not cpu_products.is_faster(kind, layer._buffers, states)
    found = layer(states)
    assert found.dtype == paddle.float64
    assert_near(found.numpy(), states.numpy() @ layer.dequantized().numpy().astype(np.float64))


@BUILT
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_kernels_are_called_where_they_help(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def watched(name: str, *arguments: Any) -> None:
        called.append(name)
        call(name, *arguments)

    call = cpu_library.call
    monkeypatch.setattr(cpu_library, "call", watched)
    layer = make_layer(kind, draw(64, 9))
    inputs = paddle.to_tensor(draw(3, 64), stop_gradient=False)
    layer(inputs).sum().backward()
    assert called == [f"{kind}_product", f"{kind}_widen"]  # the backward pass is not one of few rows of codes
    called.clear()
    layer(paddle.to_tensor(draw(49, 64)))
    assert called == [f"{kind}_widen"]
    called.clear()
    with cpu_library.switched_off():
        layer(inputs).sum().backward()
        layer.dequantized()
    make_layer("bfloat16", draw(64, 9))(inputs)
    assert called == []


@BUILT
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_product_of_few_rows_takes_no_memory_but_its_outputs(kind: str) -> None:
    layer, states = make_layer(kind, draw(1024, 1024)), paddle.to_tensor(draw(2, 1024))
    layer(states)
    before = core.host_memory_stat_current_value("Allocated", 0)
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    layer(states)
    assert core.host_memory_stat_peak_value("Allocated", 0) - before < 4 * 2 * 1024 + 4096  # the weight has 4 MiB
