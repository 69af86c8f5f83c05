"""Linear layers without a gradient, in fewer passes: equal to a call of the layer."""

from __future__ import annotations

import paddle
import pytest

from paddlemix.models.kernels import cpu
from paddlemix.models.kernels.formulas import product
from paddlemix.models.layers import apply_linear, skip_initialisation
from paddlemix.models.layers import linear as build_linear
from tests.kernels_built import need_kernels
from tests.tiny_models import draw, randomise


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 9), (2, 9), (16, 9), (17, 9), (2, 1, 9), (3, 4, 9), (5, 7, 9)], ids=str)
def test_without_a_gradient_it_is_the_layer(shape: tuple[int, ...], bias: bool) -> None:
    layer, inputs = randomise(build_linear(9, 21, 0.1, bias)), paddle.to_tensor(draw(*shape))
    wanted = layer(inputs)
    with paddle.no_grad():
        found = apply_linear(layer, inputs)
        assert found.stop_gradient and found.shape == wanted.shape
        assert (found - wanted).abs().max().item() < 4e-6
        assert (product(inputs, layer.weight) - inputs @ layer.weight).abs().max().item() < 4e-6


@pytest.mark.usefixtures("form")
def test_with_a_gradient_it_is_recorded() -> None:
    layer, inputs = randomise(build_linear(9, 21, 0.1, True)), paddle.to_tensor(draw(3, 9), stop_gradient=False)
    apply_linear(layer, inputs).sum().backward()
    assert all(part.grad is not None for part in (inputs, *layer.parameters()))


def test_a_layer_of_another_kind_is_called() -> None:
    class Doubled(paddle.nn.Linear):
        def forward(self, inputs: paddle.Tensor) -> paddle.Tensor:
            return 2 * super().forward(inputs)

    layer, inputs = randomise(Doubled(9, 21)), paddle.to_tensor(draw(3, 9))
    with paddle.no_grad():
        assert (apply_linear(layer, inputs) == layer(inputs)).all()


@pytest.mark.parametrize(("rows", "few"), [(1, False), (2, True), (16, True), (17, False)])
def test_few_rows_take_the_compiled_product(monkeypatch: pytest.MonkeyPatch, rows: int, few: bool) -> None:
    need_kernels()
    taken: list[int] = []
    monkeypatch.setattr(cpu, "matmul_few", lambda inputs, weight: taken.append(inputs.shape[0]))
    product(paddle.ones([rows, 3]), paddle.ones([3, 5]))
    assert taken == ([rows] if few else [])


def test_weights_begin_as_zeros_where_they_are_read_next() -> None:
    with skip_initialisation():
        assert not build_linear(3, 5, 0.1).weight.any()
    assert build_linear(3, 5, 0.1).weight.abs().max().item() > 0
