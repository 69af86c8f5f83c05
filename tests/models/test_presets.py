"""Presets against published numbers, and shapes without weights against real models."""

from __future__ import annotations

import pytest

from paddlemix.errors import UserError
from paddlemix.models.configuration import LlavaConfig
from paddlemix.models.language_presets import LANGUAGE_MODELS
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


# Source: the sizes that are listed for each model, in most cases `total_size` of its index of weights divided by two
# bytes.  Vicuna's are Llama-2's.
PUBLISHED_COUNTS = {
    "vicuna-7b-v1.5": 6_738_415_616,
    "vicuna-13b-v1.5": 13_015_864_320,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-instruct-v0.2": 7_241_732_096,
    "yi-34b": 34_388_917_248,
    "nous-hermes-2-yi-34b": 34_388_917_248,
    "llama-3-8b-instruct": 8_030_261_248,
    "llama-3.1-8b-instruct": 8_030_261_248,
    "qwen1.5-7b-chat": 7_721_324_544,
    "qwen1.5-72b-chat": 72_287_920_128,
    "qwen1.5-110b-chat": 111_209_914_368,
    "qwen2-7b-instruct": 7_615_616_512,
    "qwen2-72b-instruct": 72_706_203_648,
    # published as pickles, without a count: embeddings, then layers of four projections with biases
    "internlm-chat-7b": 2 * 103168 * 4096 + 32 * (4 * (4096**2 + 4096) + 3 * 4096 * 11008 + 2 * 4096) + 4096,
    "internlm2-chat-7b": 7_737_708_544,
    "internlm2-chat-20b": 19_861_149_696,
}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models_have_the_published_size(name: str) -> None:
    assert count_parameters(preset(name)) == PUBLISHED_COUNTS[name]


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llava-v1.6-mistral-7b", 7.57), ("llama3-llava-next-8b", 8.36), ("llava-v1.6-34b", 34.8)],
)
def test_llava_hf_models_have_the_published_size(name: str, billions: float) -> None:
    """Source: the model size that Hugging Face shows for llava-hf's repositories.  They hold the whole tower, and 64
    rows more in embedding and output layer."""
    config = preset(name)
    behind = 4 * 1024**2 + 2 * 1024 * 4096 + 9 * 1024 + 4096 + 2 * 1024  # the tower's last layer and the norm behind it
    found = count_parameters(config) + behind + 2 * 64 * config.text.hidden_size
    assert round(found / 1e9, 2 if billions < 10 else 1) == billions


def test_the_whole_tower_has_the_published_size() -> None:
    """Source: transformers' CLIPVisionModel of openai/clip-vit-large-patch14-336, all 24 layers."""
    assert count(tower_shapes(tower_preset("clip-vit-large-patch14-336"))) == 303_507_456
    fewer_positions = (24 * 24 - 16 * 16) * 1024
    assert count(tower_shapes(tower_preset("clip-vit-large-patch14"))) == 303_507_456 - fewer_positions


def test_internvl_of_448_pixels() -> None:
    """InternVL-Chat-LLaVA's `*_448_vicuna13b`: all but the positions as at 336 pixels, layer -4."""
    wide, narrow = (preset(f"OpenGVLab/InternVL-Chat-ViT-6B-Vicuna-13B{suffix}") for suffix in ("-448px", ""))
    assert (wide.mm_vision_select_layer, wide.num_tower_layers) == (-4, 45)
    assert wide.vision == tower_preset("OpenGVLab/InternViT-6B-448px")
    assert wide.tokens_per_tile == 1024
    assert count_parameters(wide) - count_parameters(narrow) == (32**2 - 24**2) * 3200


@pytest.mark.parametrize(
    ("name", "exact", "millions"),
    [
        ("internvit-6b-224px", 5_902_793_600, 5903),
        ("internvit-6b-448px-v1-0", 5_905_251_200, 5905),
        ("internvit-6b-448px-v1-2", 5_536_496_000, 5540),
        ("internvit-6b-448px-v1-5", 5_536_496_000, 5540),
    ],
)
def test_intern_vit_has_the_published_size(name: str, exact: int, millions: int) -> None:
    """Sources: Chen et al. 2023, "InternVL", table 1 (5903 M for 48 layers at width 3200, of the 224-pixel model, whose
    positions are 768 fewer than at 448); model card of InternViT-6B-448px-V1-5 (5540 M without the last 3 layers)."""
    found = count(tower_shapes(tower_preset(name)))
    assert found == exact
    assert abs(found / 1e6 - millions) < 5


def test_internvl_chat_has_the_published_parts() -> None:
    """Source: 29.9 million weights of the projector on 7B, 42.6 on 13B; 45 of 48 layers are needed, at 336 pixels."""
    for name, projector in (("7b", 29_892_608), ("13b", 42_608_640)):
        config = preset(f"OpenGVLab/InternVL-Chat-ViT-6B-Vicuna-{name.upper()}")
        shapes = parameter_shapes(config)
        assert count({key: shape for key, shape in shapes.items() if key.startswith("projector.")}) == projector
        assert shapes["vision_tower.position_embedding"] == (577, 3200)
        assert config.num_tower_layers == 45
        assert config.tokens_per_tile == 576


@pytest.mark.parametrize(("name", "published"), [("llava-v1.5-7b", 20_979_712), ("llava-v1.5-13b", 31_467_520)])
def test_projectors_have_the_published_size(name: str, published: int) -> None:
    shapes = parameter_shapes(preset(name))
    assert count({key: shape for key, shape in shapes.items() if key.startswith("projector.")}) == published


@pytest.mark.parametrize(
    ("name", "language_model", "newline"),
    [
        ("llava-v1.5-7b", "vicuna-7b-v1.5", 0),
        ("llava-v1.6-vicuna-7b", "vicuna-7b-v1.5", 4096),
        ("llava-v1.6-mistral-7b", "mistral-7b-instruct-v0.2", 4096),
        ("llava-v1.6-34b", "nous-hermes-2-yi-34b", 7168),
        ("llama3-llava-next-8b", "llama-3-8b-instruct", 4096),
        ("llava-next-72b", "qwen1.5-72b-chat", 8192),
        ("llava-next-110b", "qwen1.5-110b-chat", 8192),
        ("llava-internlm-7b", "internlm-chat-7b", 0),
        ("llava-internlm2-7b", "internlm2-chat-7b", 0),
        ("llava-internlm2-20b", "internlm2-chat-20b", 0),
    ],
)
def test_a_llava_model_is_the_sum_of_its_parts(name: str, language_model: str, newline: int) -> None:
    width = LANGUAGE_MODELS[language_model].hidden_size
    projector = 1024 * width + width**2 + 2 * width
    layer = 4 * 1024**2 + 2 * 1024 * 4096 + 9 * 1024 + 4096  # of the tower: attention, feed-forward, biases, two norms
    built_tower = 303_507_456 - layer - 2 * 1024  # neither the last layer nor the norm behind it
    assert count_parameters(preset(name)) == PUBLISHED_COUNTS[language_model] + projector + built_tower + newline


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
