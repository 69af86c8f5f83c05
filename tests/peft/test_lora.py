"""LoRA: nothing changes at the start, the formula holds, and merging changes nothing either."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import nn

from paddlemix.errors import UserError
from paddlemix.models.layers import skip_initialisation
from paddlemix.models.llava import LlavaModel
from paddlemix.peft.lora import (
    LoRAConfig,
    LoRALinear,
    add_lora,
    linear_names,
    lora_parameters,
    merge_lora,
)
from tests.tiny_models import draw, tiny_llava, tiny_model

MODULES = (
    "language_model.layers.0.self_attn.q_proj",
    "language_model.layers.1.mlp.down_proj",
    "vision_tower.layers.0.self_attn.v_proj",
    "projector.0",
    "lm_head",
)


def logits(model: LlavaModel) -> np.ndarray:
    """Of a row with an image's four patches and a newline in the middle."""
    pixels, index = paddle.to_tensor(draw(1, 3, 6, 6)), paddle.to_tensor([0, 7, 8, 9, 10, 11, 6])
    with paddle.no_grad():
        hidden = model(paddle.to_tensor([[1, 0, 0, 0, 0, 0, 7]]), paddle.arange(7).unsqueeze(0), None, pixels, index)
        return model.logits(hidden).numpy()


def adapted(**changes: Any) -> LlavaModel:
    """A tiny model with drawn adapters."""
    model = tiny_model()
    add_lora(model, LoRAConfig(**{"r": 3, "lora_alpha": 6, "modules": MODULES, **changes}))
    for number, (_, parameter) in enumerate(lora_parameters(model)):
        parameter.set_value(0.3 * draw(*parameter.shape, seed=number))
    return model


def test_at_the_start_no_output_changes_in_any_bit() -> None:
    model = tiny_model()
    before = logits(model)
    add_lora(model, LoRAConfig(r=3, modules=tuple(linear_names(model)), lora_dropout=0.5))
    assert logits(model).tobytes() == before.tobytes()
    model.train()  # dropout acts on the adapter alone, and B is zero
    assert logits(model).tobytes() == before.tobytes()


def test_the_start_values_are_kaiming_uniform_and_zero() -> None:
    model = tiny_model()
    add_lora(model, LoRAConfig(r=64, modules=("language_model.layers.0.self_attn.q_proj",)))
    (_, a), (_, b) = lora_parameters(model)
    bound = 1 / math.sqrt(12)
    assert a.shape == [12, 64]
    assert b.shape == [64, 12]
    assert not b.numpy().any()
    assert 0.9 * bound < np.abs(a.numpy()).max() <= bound
    assert abs(a.numpy().mean()) < 0.1 * bound


def test_within_skip_initialisation_both_are_zeros() -> None:
    model = tiny_model()
    with skip_initialisation():
        add_lora(model, LoRAConfig(r=2, modules=("lm_head",)))
    assert not any(parameter.numpy().any() for _, parameter in lora_parameters(model))


def test_the_formula() -> None:
    base = nn.Linear(5, 4)
    layer = LoRALinear(base, LoRAConfig(r=2, lora_alpha=6))
    for seed, parameter in enumerate((layer.lora_A, layer.lora_B, layer.weight, layer.bias)):
        parameter.set_value(draw(*parameter.shape, seed=seed))
    x, (a, b, weight, bias) = (
        draw(3, 5, seed=9),
        (draw(*shape, seed=n) for n, shape in enumerate([(5, 2), (2, 4), (5, 4), (4,)])),
    )
    np.testing.assert_allclose(layer(paddle.to_tensor(x)).numpy(), x @ weight + bias + 3.0 * (x @ a @ b), atol=1e-5)
    np.testing.assert_allclose(layer.merged_weight().numpy(), weight + 3.0 * (a @ b), atol=1e-5)


def test_merged_equals_unmerged() -> None:
    model, plain = adapted(), tiny_model()
    unmerged = logits(model)
    assert np.abs(unmerged - logits(plain)).max() > 0.01
    assert merge_lora(model) == len(MODULES)
    np.testing.assert_allclose(logits(model), unmerged, atol=1e-5)
    assert not list(lora_parameters(model))
    shapes = {name: value.shape for name, value in plain.named_parameters()}
    assert {name: value.shape for name, value in model.named_parameters()} == shapes
    assert merge_lora(model) == 0


def test_only_the_named_layers_change_when_merged() -> None:
    model, plain = adapted(), tiny_model()
    merge_lora(model)
    before = {name: value.numpy() for name, value in plain.named_parameters()}
    changed = {name for name, value in model.named_parameters() if value.numpy().tobytes() != before[name].tobytes()}
    assert changed == {f"{module}.weight" for module in MODULES}


def test_parameter_names_are_the_layers_own_and_two_more() -> None:
    model = adapted()
    names = {name for name, _ in model.named_parameters()}
    for module in MODULES:
        assert {f"{module}.weight", f"{module}.lora_A", f"{module}.lora_B"} <= names
    assert [name for name, _ in lora_parameters(model)] == [name for name in names_in_order(model) if "lora_" in name]
    assert set(linear_names(model)) == set(linear_names(tiny_model()))


def names_in_order(model: LlavaModel) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def test_a_linear_projector_can_be_adapted() -> None:
    model = tiny_model(tiny_llava(mm_projector_type="linear"))
    add_lora(model, LoRAConfig(r=2, modules=("projector",)))
    assert {"projector.weight", "projector.bias", "projector.lora_A"} <= set(names_in_order(model))
    assert merge_lora(model) == 1


def test_dropout_acts_in_training_only() -> None:
    model, without = adapted(lora_dropout=0.5), adapted()
    assert logits(model).tobytes() == logits(without).tobytes()  # the model was in evaluation mode before
    model.train()
    paddle.seed(1)
    first, second = logits(model), logits(model)
    assert np.abs(first - second).max() > 1e-3
    model.eval()
    assert logits(model).tobytes() == logits(without).tobytes()


def test_an_adapter_takes_the_mode_of_its_layer() -> None:
    for training in (True, False):
        model = tiny_model()
        model.train() if training else model.eval()
        add_lora(model, LoRAConfig(r=2, modules=("lm_head",)))
        assert model.lm_head.training is training


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("language_model.layers.9.self_attn.q_proj", "'language_model.layers.9.self_attn.q_proj' does not exist"),
        ("visual.proj", "'visual.proj' does not exist in this model; is the adapter for another base"),
        ("language_model.norm", "'language_model.norm' is not a linear layer of this model"),
        ("lm_hed", "'lm_hed' is not a linear layer"),
    ],
)
def test_an_unknown_module_is_refused_and_nothing_replaced(module: str, message: str) -> None:
    model = tiny_model()
    with pytest.raises(UserError, match=message):
        add_lora(model, LoRAConfig(r=2, modules=("lm_head", module)))
    assert not list(lora_parameters(model))
