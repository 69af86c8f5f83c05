"""DoRA, PiSSA and LoRA on few and many rows against formulas written here in numpy."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle import nn

from paddlemix.peft.dora import DoRALinear
from paddlemix.peft.linear import LoRALinear
from paddlemix.peft.pissa import PiSSALinear, principal_factors
from paddlemix.peft.settings import LoRAConfig
from tests.tiny_models import draw

IN, OUT = 7, 5
LARGE = 40  # rows: for so many the update is added to the weight first


def base(seed: int = 0, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(IN, OUT, bias_attr=None if bias else False)
    for number, parameter in enumerate(layer.parameters()):
        parameter.set_value(draw(*parameter.shape, seed=seed + number))
        parameter.stop_gradient = True
    return layer


def drawn(layer: LoRALinear) -> LoRALinear:
    """The layer with drawn factors."""
    layer.lora_A.set_value(0.5 * draw(*layer.lora_A.shape, seed=11))
    layer.lora_B.set_value(0.5 * draw(*layer.lora_B.shape, seed=12))
    return layer


@pytest.mark.parametrize("rows", [1, LARGE])
@pytest.mark.parametrize("bias", [True, False])
def test_dora(rows: int, bias: bool) -> None:
    layer = drawn(DoRALinear(base(bias=bias), LoRAConfig(r=2, lora_alpha=3, use_dora=True)))
    magnitude = np.abs(draw(OUT, seed=13))
    layer.lora_magnitude_vector.set_value(magnitude)
    total = layer.weight.numpy() + 1.5 * layer.lora_A.numpy() @ layer.lora_B.numpy()
    merged = total * magnitude / np.linalg.norm(total, axis=0)
    x = draw(rows, IN, seed=14)
    wanted = x @ merged + (layer.bias.numpy() if bias else 0)
    np.testing.assert_allclose(layer(paddle.to_tensor(x)).numpy(), wanted, atol=1e-5)
    np.testing.assert_allclose(layer.merged_weight().numpy(), merged, atol=1e-5)


@pytest.mark.parametrize("rows", [1, LARGE])
def test_the_length_is_a_constant_in_doras_gradient(rows: int) -> None:
    layer = drawn(DoRALinear(base(), LoRAConfig(r=2, lora_alpha=3, use_dora=True)))
    x = draw(rows, IN, seed=14)
    layer(paddle.to_tensor(x)).sum().backward()
    total = layer.weight.numpy() + 1.5 * layer.lora_A.numpy() @ layer.lora_B.numpy()
    length = np.linalg.norm(total, axis=0)
    gain = layer.lora_magnitude_vector.numpy() / length
    per_weight = np.outer(x.sum(0), gain)  # gradient of the sum [IN, OUT], the length held fixed
    np.testing.assert_allclose(layer.lora_A.grad.numpy(), 1.5 * per_weight @ layer.lora_B.numpy().T, atol=1e-4)
    np.testing.assert_allclose(layer.lora_B.grad.numpy(), 1.5 * layer.lora_A.numpy().T @ per_weight, atol=1e-4)
    np.testing.assert_allclose(layer.lora_magnitude_vector.grad.numpy(), (x.sum(0) @ total) / length, atol=1e-4)
    assert layer.weight.grad is None


def test_doras_magnitude_begins_as_the_lengths_and_survives_an_output_of_zeros() -> None:
    plain = base()
    plain.weight.set_value(plain.weight.numpy() * np.array([1, 1, 0, 1, 1], dtype="float32"))
    layer = DoRALinear(plain, LoRAConfig(r=2, use_dora=True))
    np.testing.assert_allclose(
        layer.lora_magnitude_vector.numpy(), np.linalg.norm(plain.weight.numpy(), axis=0), atol=1e-6
    )
    x = paddle.to_tensor(draw(LARGE, IN))
    np.testing.assert_allclose(layer(x).numpy(), plain(x).numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear, PiSSALinear])
def test_few_rows_give_the_same_as_many(kind: type[LoRALinear]) -> None:
    plain = nn.Linear(64, 48)
    plain.weight.set_value(0.1 * draw(64, 48))
    layer = drawn(kind(plain, LoRAConfig(r=8, lora_alpha=3)))
    x = paddle.to_tensor(draw(LARGE, 64))
    assert layer._is_added_first(x) and not layer._is_added_first(x[:1])
    one_by_one = paddle.concat([layer(x[row : row + 1]) for row in range(LARGE)])
    np.testing.assert_allclose(layer(x).numpy(), one_by_one.numpy(), atol=2e-5)


def test_the_sum_is_not_made_in_low_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = drawn(LoRALinear(base(), LoRAConfig(r=2))), paddle.to_tensor(draw(LARGE, IN))
    assert layer._is_added_first(x)
    monkeypatch.setattr(paddle.amp, "is_autocast_enabled", lambda: True)
    assert not layer._is_added_first(x)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (1, 4)])
def test_principal_factors_are_those_of_the_singular_values(shape: tuple[int, int]) -> None:
    weight = draw(*shape, seed=3)
    u, s, v = np.linalg.svd(weight.astype("float64"), full_matrices=False)
    for rank in range(1, min(shape) + 1):
        first, second = principal_factors(weight, rank)
        assert first.shape == (shape[0], rank) and second.shape == (rank, shape[1])
        np.testing.assert_allclose(first @ second, (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(first, axis=0) ** 2, s[:rank], rtol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(second, axis=1) ** 2, s[:rank], rtol=1e-5)


def test_principal_factors_of_a_matrix_of_less_rank() -> None:
    weight = np.outer(draw(6, seed=1), draw(4, seed=2)).astype("float32")
    first, second = principal_factors(weight, 3)
    assert np.isfinite(first).all() and np.isfinite(second).all()
    np.testing.assert_allclose(first @ second, weight, atol=1e-6)
    assert not any(factor.any() for factor in principal_factors(np.zeros((3, 4), dtype="float32"), 2))


@pytest.mark.parametrize("rows", [1, LARGE])
@pytest.mark.parametrize("rslora", [False, True])
def test_pissa(rows: int, rslora: bool) -> None:
    plain = base()
    before = plain.weight.numpy()
    layer = PiSSALinear(plain, LoRAConfig(r=2, lora_alpha=3, pissa=True, rslora=rslora))
    u, s, v = np.linalg.svd(before, full_matrices=False)
    start = layer.lora_A_start.numpy() @ layer.lora_B_start.numpy()
    np.testing.assert_allclose(layer.scaling * start, (u[:, :2] * s[:2]) @ v[:2], atol=1e-5)
    assert layer.scaling == pytest.approx(3 / 2**0.5 if rslora else 1.5)
    assert layer.lora_A.numpy().tobytes() == layer.lora_A_start.numpy().tobytes()
    np.testing.assert_allclose(layer.merged_weight().numpy(), before, atol=1e-6)
    drawn(layer)
    wanted = before - layer.scaling * start + layer.scaling * layer.lora_A.numpy() @ layer.lora_B.numpy()
    x = draw(rows, IN)
    np.testing.assert_allclose(layer(paddle.to_tensor(x)).numpy(), x @ wanted + plain.bias.numpy(), atol=1e-5)
    assert layer.weight.numpy().tobytes() == before.tobytes()  # the base is as it was


def test_pissa_in_bfloat16_changes_nothing_at_the_start() -> None:
    plain = base()
    half = plain.create_parameter([IN, OUT], dtype="bfloat16")
    half.set_value(plain.weight.astype("bfloat16"))
    plain.weight = half
    layer = PiSSALinear(plain, LoRAConfig(r=2, pissa=True))
    assert layer.lora_A.dtype == layer.lora_B_start.dtype == paddle.bfloat16
    assert layer.merged_weight().numpy().tobytes() == half.astype("float32").numpy().tobytes()
