"""Sizes as data: they survive a JSON file, and what cannot work is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from paddlemix.errors import UserError
from paddlemix.models.configuration import DecoderConfig, LlavaConfig, VisionConfig, pick_fields, projector_depth
from tests.tiny_models import tiny_llava, tiny_text, tiny_vision


@pytest.mark.parametrize(
    "config",
    [
        LlavaConfig(),
        tiny_llava(),
        tiny_llava(
            text=tiny_text(
                model_type="qwen2",
                head_dim=8,
                tie_word_embeddings=True,
                attention_bias=True,
                attention_output_bias=False,
                sliding_window=7,
                rope_scaling={"rope_type": "dynamic", "factor": 2.0},
            ),
            mm_projector_type="linear",
            mm_vision_select_layer=1,
            mm_vision_select_feature="cls_patch",
            image_newline=False,
        ),
    ],
)
def test_a_config_survives_json(config: LlavaConfig) -> None:
    assert LlavaConfig.from_dict(json.loads(json.dumps({**config.to_dict(), "model_type": "x"}))) == config


def test_picked_fields_leave_out_what_is_unknown_or_null() -> None:
    config = pick_fields(DecoderConfig, {"hidden_size": 64, "rope_scaling": None, "torch_dtype": "float16"})
    assert config == DecoderConfig(hidden_size=64)


def test_what_a_llama_file_leaves_out_is_transformers_default() -> None:
    """A llava-hf text_config omits what equals LlamaConfig's default: 1e-06, for one, is then not written."""
    config = DecoderConfig()
    assert (config.rms_norm_eps, config.rope_theta, config.max_position_embeddings) == (1e-6, 10000.0, 2048)
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (4096, 11008, 32000)
    assert (config.key_value_heads, config.head_size, config.tie_word_embeddings) == (32, 128, False)


def test_derived_sizes() -> None:
    assert (tiny_text().key_value_heads, tiny_text(num_key_value_heads=None).key_value_heads) == (1, 2)
    assert (tiny_text().head_size, tiny_text(head_dim=8).head_size) == (6, 8)
    assert VisionConfig().num_patches == 576
    assert tiny_vision(image_size=11).num_patches == 9
    assert tiny_llava().tokens_per_tile == 4
    assert tiny_llava(mm_vision_select_feature="cls_patch").tokens_per_tile == 5


@pytest.mark.parametrize(
    ("kind", "depth"), [("identity", 0), ("linear", 1), ("mlp1x_gelu", 1), ("mlp2x_gelu", 2), ("mlp12x_gelu", 12)]
)
def test_projector_depth(kind: str, depth: int) -> None:
    assert projector_depth(kind) == depth


@pytest.mark.parametrize(
    ("build", "changes", "message"),
    [
        (
            tiny_text,
            {"num_attention_heads": 3, "num_key_value_heads": 2},
            "3 is not a multiple of num_key_value_heads 2",
        ),
        (tiny_text, {"hidden_size": 13}, "hidden_size 13 is not a multiple of num_attention_heads 2; give head_dim"),
        (tiny_text, {"head_dim": 5}, "head width 5 is odd"),
        (tiny_text, {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported in the language model; allowed: silu"),
        (tiny_text, {"sliding_window": 0}, "sliding_window 0 is neither null nor at least 1"),
        (tiny_text, {"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope_scaling .* is not supported"),
        (tiny_text, {"rope_scaling": {}}, "rope_scaling {} is not supported; allowed: null, or one of type linear"),
        (tiny_vision, {"hidden_act": "relu"}, "'relu' is not one of quick_gelu, gelu"),
        (tiny_vision, {"num_attention_heads": 3}, "vision hidden_size 10 is not a multiple of num_attention_heads 3"),
        (tiny_llava, {"mm_vision_select_feature": "cls"}, "'cls' is not one of patch, cls_patch"),
        (tiny_llava, {"mm_vision_select_layer": 4}, "mm_vision_select_layer 4 is outside the tower's 3 layers"),
        (tiny_llava, {"mm_vision_select_layer": -5}, "mm_vision_select_layer -5 .* allowed: -4 to 3"),
        (tiny_llava, {"mm_projector_type": "mlp"}, "mm_projector_type 'mlp' is not one of"),
        (tiny_llava, {"mm_projector_type": "identity"}, "'identity' needs equal widths; the tower has 10, .* 12"),
    ],
)
def test_what_cannot_work_is_refused(build: Callable[..., Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**changes)
