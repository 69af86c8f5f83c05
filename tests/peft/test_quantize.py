"""Quantised linear layers: values, gradients and memory against the float layer that they stand for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.base import core
from paddle.distributed.fleet.utils import recompute
from paddle.nn import functional

from paddlemix.errors import UserError
from paddlemix.models.llava import LlavaModel
from paddlemix.peft import quantized_linear
from paddlemix.peft.lora import LoRAConfig, add_lora, lora_parameters
from paddlemix.peft.quantize import (
    QuantizationConfig,
    quantization_of,
    quantize_model,
    quantized_linears,
)
from paddlemix.peft.quantized_linear import QuantizedLinear
from paddlemix.peft.quantized_weight import KINDS, NF4_LEVELS, QuantizedWeight, quantize_weight
from tests.tiny_models import dequantize_model, draw, tiny_llava, tiny_model, tiny_text

pytestmark = pytest.mark.usefixtures("form")  # in C and in paddle's operators

MEBIBYTE = 2**20


def make_layer(kind: str, weight: np.ndarray, bias: np.ndarray | None = None) -> QuantizedLinear:
    parameter = None
    if bias is not None:
        parameter = nn.Linear(1, len(bias)).bias
        parameter.set_value(bias)
    layer = QuantizedLinear(kind, (weight.shape[0], weight.shape[1]), parameter)
    layer.fill(quantize_weight(weight, kind))
    return layer


def plain_dequantized(weight: QuantizedWeight) -> np.ndarray:
    """[in, out] float32, from the arrays alone."""
    arrays, (in_features, out_features) = weight.arrays, weight.shape
    if weight.kind == "int8":
        return (arrays["weight_codes"].astype(np.float32) * arrays["weight_scale"][:, None]).T
    if weight.kind == "nf4":
        codes = arrays["weight_codes"]
        levels = NF4_LEVELS[np.stack([codes >> 4, codes & 15], axis=-1)].reshape(out_features, -1, 64)
        scales = arrays["weight_scale_codes"].astype(np.float32) * arrays["weight_scale_steps"][:, None]
        scales = (scales + arrays["weight_scale_offset"]).reshape(-1)[: levels.size // 64]
        return (levels * scales.reshape(out_features, -1, 1)).reshape(out_features, -1)[:, :in_features].T
    values = arrays["weight_values"]
    bits = values.astype(np.uint32) << 16 if weight.kind == "bfloat16" else None
    return (values.astype(np.float32) if bits is None else bits.view(np.float32)).T


@pytest.mark.parametrize("shape", [(64, 5), (100, 300), (12, 1), (192, 41)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [False, True])
def test_the_wide_weight_equals_the_plain_one(
    kind: str, shape: tuple[int, int], pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, whether it is made at once or in pieces that end inside a group of scales."""
    if pieces:
        monkeypatch.setattr(quantized_linear, "_WIDE_BYTES", 7 * 4 * shape[0])
    weight = draw(*shape)
    found = make_layer(kind, weight).dequantized().numpy()
    assert found.dtype == np.float32
    assert np.ascontiguousarray(found).tobytes() == plain_dequantized(quantize_weight(weight, kind)).tobytes("C")


def test_the_error_of_a_weight_is_bounded() -> None:
    weight = draw(192, 50)
    int8 = quantize_weight(weight, "int8")
    error = np.abs(plain_dequantized(int8) - weight)
    assert (error <= int8.arrays["weight_scale"] / 2 * 1.0001).all()
    nf4 = quantize_weight(weight, "nf4")
    largest = np.abs(weight.T.reshape(-1, 64)).max(axis=1)
    bound = largest * np.diff(NF4_LEVELS).max() / 2 + nf4.arrays["weight_scale_steps"][0]  # of the codes, of the scales
    assert (np.abs(plain_dequantized(nf4) - weight).T.reshape(-1, 64).max(axis=1) <= bound).all()
    assert np.linalg.norm(plain_dequantized(nf4) - weight) / np.linalg.norm(weight) < 0.11


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_outputs_and_gradients_equal_the_float_layers(
    kind: str, pieces: bool, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pieces:
        monkeypatch.setattr(quantized_linear, "_WIDE_BYTES", 4 * 128 * 5)
    bias = draw(33, seed=3) if with_bias else None
    layer = make_layer(kind, draw(100, 33), bias)
    results = []
    for product in (layer, lambda x: functional.linear(x, layer.dequantized(), layer.bias)):
        inputs = paddle.to_tensor(draw(2, 7, 100, seed=2), stop_gradient=False)
        outputs = product(inputs)
        (outputs * paddle.to_tensor(draw(2, 7, 33, seed=4))).sum().backward()
        bias_grad = None if layer.bias is None else layer.bias.grad.numpy()
        results.append((outputs.numpy(), inputs.grad.numpy(), bias_grad))
        layer.clear_gradients()
    for found, expected in zip(*results, strict=True):
        if expected is not None:
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_without_gradient_give_outputs_without(kind: str) -> None:
    layer = make_layer(kind, draw(64, 4))
    assert layer(paddle.to_tensor(draw(3, 64))).stop_gradient
    assert not layer(paddle.to_tensor(draw(3, 64), stop_gradient=False)).stop_gradient


@pytest.mark.parametrize("kind", KINDS)
def test_recompute_gives_the_same_gradient(kind: str) -> None:
    layer = make_layer(kind, draw(64, 64))
    grads = []
    for call in (lambda x: layer(layer(x)), lambda x: recompute(lambda y: layer(layer(y)), x, use_reentrant=False)):
        inputs = paddle.to_tensor(draw(3, 64), stop_gradient=False)
        call(inputs).square().sum().backward()
        grads.append(inputs.grad.numpy())
    assert grads[0].tobytes() == grads[1].tobytes()


def allocated(peak: bool = False) -> int:
    """Bytes that paddle's tensors take on the host."""
    read: Callable[[str, int], int] = core.host_memory_stat_peak_value if peak else core.host_memory_stat_current_value
    return read("Allocated", 0)


@pytest.mark.parametrize(("kind", "per_weight"), [("int8", 1.02), ("nf4", 0.55), ("bfloat16", 2.0)])
def test_neither_pass_keeps_the_wide_weight(kind: str, per_weight: float) -> None:
    """Six layers of 4 MiB in float32: what forward leaves behind are outputs, and the peak is a few pieces."""
    size, count = 1024, 6
    weight = draw(size, size)
    make_layer("nf4", draw(64, 4))(paddle.zeros([1, 64]))  # the table of levels is there from now on
    start = allocated()
    layers = [make_layer(kind, weight) for _ in range(count)]
    held = allocated() - start
    assert held <= per_weight * count * size * size
    inputs = paddle.to_tensor(draw(4, size), stop_gradient=False)
    outputs, before = inputs, allocated()
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    for layer in layers:
        outputs = layer(outputs) * 0.01
    assert allocated() - before < MEBIBYTE
    outputs.sum().backward()
    assert allocated() - before < MEBIBYTE
    assert allocated(peak=True) - before < 20 * MEBIBYTE  # the float weights together are 24
    assert inputs.grad is not None


def test_moving_to_another_dtype_leaves_the_codes() -> None:
    model = nn.Sequential(make_layer("int8", draw(8, 4)), nn.Linear(4, 4), make_layer("nf4", draw(4, 4)))
    before = [model[0].stored("weight_scale"), model[2].stored("weight_codes")]
    model.to(dtype="bfloat16")
    assert model[1].weight.dtype == paddle.bfloat16
    assert model[0].stored("weight_scale").tobytes() == before[0].tobytes()
    assert model[2].stored("weight_codes").tobytes() == before[1].tobytes()
    assert model[0].weight_codes.dtype == paddle.int8


def test_an_array_that_does_not_fit_is_refused() -> None:
    layer = QuantizedLinear("int8", (4, 3))
    assert not layer.filled
    with pytest.raises(ValueError, match="array 'weight_scale' is float32"):
        layer.store("weight_scale", np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="array 'weight_values' is float16"):
        layer.store("weight_values", np.zeros((3, 4), np.float16))
    with pytest.raises(ValueError, match="nf4 .* does not fit a layer of int8"):
        layer.fill(quantize_weight(draw(4, 3), "nf4"))


def logits(model: LlavaModel) -> np.ndarray:
    """Of a row with an image's four patches."""
    pixels, index = paddle.to_tensor(draw(1, 3, 6, 6)), paddle.to_tensor([0, 7, 8, 9, 10, 11, 6])
    with paddle.no_grad():
        hidden = model(paddle.to_tensor([[1, 0, 0, 0, 0, 0, 7]]), paddle.arange(7).unsqueeze(0), None, pixels, index)
        return model.logits(hidden).numpy()


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.05), ("nf4", 0.4), ("bfloat16", 0.02), ("float16", 0.002)])
def test_a_quantised_model_is_near_the_float_one(kind: str, error: float) -> None:
    model, plain = tiny_model(), tiny_model()
    assert quantize_model(model, QuantizationConfig(kind=kind)) == 2 * 7
    expected = logits(plain)
    assert np.linalg.norm(logits(model) - expected) / np.linalg.norm(expected) < error
    names = {f"language_model.layers.{layer}.{name}" for layer in (0, 1) for name in _LINEAR}
    assert set(quantized_linears(model)) == names
    assert {name for name, _ in model.named_parameters()} == {
        name for name, _ in plain.named_parameters() if name.removesuffix(".weight") not in names
    }
    quantised = logits(model)
    assert dequantize_model(model) == 14
    np.testing.assert_allclose(logits(model), quantised, atol=1e-5)


_LINEAR = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def test_biases_stay_and_modes_are_kept() -> None:
    model = tiny_model(tiny_llava(text=tiny_text(attention_bias=True)))
    names = {name for name, _ in model.named_parameters() if name.endswith("q_proj.bias")}
    quantize_model(model, QuantizationConfig(kind="int8"))
    assert names <= {name for name, _ in model.named_parameters()}
    assert not any(layer.training for layer in quantized_linears(model).values())


def test_layers_can_be_left_out() -> None:
    model = tiny_model()
    config = QuantizationConfig(kind="nf4", skip=("*.down_proj", "language_model.layers.0.*"))
    assert quantize_model(model, config) == 6
    found = quantization_of(model)
    assert found is not None
    again = tiny_model()
    quantize_model(again, found)  # what is declared of a model makes one like it
    assert quantized_linears(again).keys() == quantized_linears(model).keys()
    assert quantization_of(tiny_model()) is None


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_an_adapter_trains_on_a_quantised_model(kind: str, use_dora: bool) -> None:
    model = tiny_model()
    quantize_model(model, QuantizationConfig(kind=kind))
    before = logits(model)
    modules = tuple(quantized_linears(model))
    add_lora(model, LoRAConfig(r=2, modules=modules, use_dora=use_dora))
    np.testing.assert_allclose(logits(model), before, atol=1e-5)
    ids, positions = paddle.to_tensor([[1, 5, 7]]), paddle.arange(3).unsqueeze(0)
    model.logits(model(ids, positions)).square().sum().backward()
    with_grad = {name for name, parameter in lora_parameters(model) if parameter.grad is not None}
    assert {f"{module}.lora_B" for module in modules} <= with_grad


def test_a_quantised_or_adapted_model_is_not_quantised() -> None:
    model = tiny_model()
    quantize_model(model, QuantizationConfig(kind="int8"))
    with pytest.raises(UserError, match=r"already quantised \(int8\)"):
        quantize_model(model, QuantizationConfig(kind="nf4"))
    model = tiny_model()
    add_lora(model, LoRAConfig(r=2, modules=("lm_head",)))
    with pytest.raises(UserError, match="has an adapter; quantise it before"):
        quantize_model(model, QuantizationConfig(kind="nf4"))


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(UserError, match="quantisation 'nf5' is not one of .*did you mean 'nf4'"):
        QuantizationConfig(kind="nf5")
    with pytest.raises(UserError, match=r"skip: '\*.qproj' matches no linear layer .*layers.0.self_attn.q_proj"):
        quantize_model(tiny_model(), QuantizationConfig(kind="nf4", skip=("*.qproj",)))


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = tiny_model()
    layer = model.language_model.layers[1].mlp.up_proj
    layer.weight.set_value(paddle.full(layer.weight.shape, float("nan")))
    with pytest.raises(UserError, match="'language_model.layers.1.mlp.up_proj.weight' cannot be quantised"):
        quantize_model(model, QuantizationConfig(kind="int8"))
