"""Presets against published numbers, and shapes without weights against real models."""

from __future__ import annotations

import pytest

from paddlemix.errors import UserError
from paddlemix.models.configuration import LlavaConfig
from paddlemix.models.llava import LlavaModel
from paddlemix.models.presets import (
    PRESETS,
    PUBLISHED_NAMES,
    TOWERS,
    count,
    count_lora_parameters,
    count_parameters,
    parameter_shapes,
    preset,
    tower_preset,
    tower_shapes,
)
from tests.tiny_models import tiny_llava, tiny_text, tiny_vision


@pytest.mark.parametrize(
    "config",
    [
        tiny_llava(),
        tiny_llava(image_newline=False, mm_projector_type="linear", mm_vision_select_feature="cls_patch"),
        tiny_llava(mm_projector_type="mlp3x_gelu", mm_vision_select_layer=1),
        tiny_llava(mm_projector_type="identity", vision=tiny_vision(hidden_size=12), mm_vision_select_layer=0),
        tiny_llava(text=tiny_text(head_dim=8, attention_bias=True, tie_word_embeddings=True)),
        LlavaConfig(text=tiny_text()),
    ],
)
def test_shapes_are_those_of_a_real_model(config: LlavaConfig) -> None:
    real = {name: tuple(parameter.shape) for name, parameter in LlavaModel(config).named_parameters()}
    assert list(parameter_shapes(config).items()) == list(real.items())
    assert count_parameters(config) == sum(parameter.size for parameter in LlavaModel(config).parameters())


def test_counting_leaves_the_names_of_later_layers_alone() -> None:
    import paddle

    with paddle.utils.unique_name.guard():
        plain = [parameter.name for parameter in LlavaModel(tiny_llava()).parameters()]
    with paddle.utils.unique_name.guard():
        parameter_shapes(tiny_llava())
        assert [parameter.name for parameter in LlavaModel(tiny_llava()).parameters()] == plain


@pytest.mark.parametrize(
    ("name", "published"), [("vicuna-7b-v1.5", 6_738_415_616), ("vicuna-13b-v1.5", 13_015_864_320)]
)
def test_language_models_have_the_published_size(name: str, published: int) -> None:
    """Source: the parameter counts that Hugging Face shows for Llama-2-7B and 13B, whose sizes Vicuna has."""
    assert count_parameters(preset(name)) == published


def test_the_whole_tower_has_the_published_size() -> None:
    """Source: transformers' CLIPVisionModel of openai/clip-vit-large-patch14-336, all 24 layers."""
    assert count(tower_shapes(tower_preset("clip-vit-large-patch14-336"))) == 303_507_456
    fewer_positions = (24 * 24 - 16 * 16) * 1024
    assert count(tower_shapes(tower_preset("clip-vit-large-patch14"))) == 303_507_456 - fewer_positions


@pytest.mark.parametrize(("name", "published"), [("llava-v1.5-7b", 20_979_712), ("llava-v1.5-13b", 31_467_520)])
def test_projectors_have_the_published_size(name: str, published: int) -> None:
    shapes = parameter_shapes(preset(name))
    assert count({key: shape for key, shape in shapes.items() if key.startswith("projector.")}) == published


@pytest.mark.parametrize(("name", "newline"), [("llava-v1.5-7b", 0), ("llava-v1.6-vicuna-7b", 4096)])
def test_a_llava_model_is_the_sum_of_its_parts(name: str, newline: int) -> None:
    layer = 4 * 1024**2 + 2 * 1024 * 4096 + 9 * 1024 + 4096  # of the tower: attention, feed-forward, biases, two norms
    built_tower = 303_507_456 - layer - 2 * 1024  # neither the last layer nor the norm behind it
    assert count_parameters(preset(name)) == 6_738_415_616 + 20_979_712 + built_tower + newline


def test_the_official_adapter_has_the_published_size() -> None:
    """Source: LLaVA's LoRA recipe on 7B at rank 128 reports 319.8 million trainable weights in the adapter."""
    assert count_lora_parameters(preset("llava-v1.5-7b"), rank=128) == 319_815_680


def test_every_published_name_has_its_preset() -> None:
    for full, short in PUBLISHED_NAMES.items():
        assert (tower_preset(full) is TOWERS[short]) if short in TOWERS else (preset(full) is PRESETS[short])


@pytest.mark.parametrize(
    ("find", "name", "meant"),
    [
        (preset, "llava-v1.5-7", "'llava-v1.5-7b'"),
        (preset, "liuhaotian/llava-v1.6-vicuna-7B", "'liuhaotian/llava-v1.6-vicuna-7b'"),
        (tower_preset, "clip-vit-large-patch14-33", "'clip-vit-large-patch14-336'"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(find, name: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"'{name}' is not one of .*did you mean {meant}"):
        find(name)


def test_a_tower_is_no_model() -> None:
    with pytest.raises(UserError, match="model preset 'clip-vit-large-patch14-336' is not one of"):
        preset("clip-vit-large-patch14-336")
