"""Sizes of published models, as data, and what follows from sizes alone: shapes and numbers of weights.

    count_parameters(preset("llava-v1.5-7b"))  # 7,050,304,512: the tower's last layer is not built

Loading never asks this file for what a checkpoint declares itself.  It knows no directory and reads no weights.

Sources: the `config.json` of each repository as named at its entry; values that they leave out are transformers'
defaults (LlamaConfig, CLIPVisionConfig).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from paddlemix.errors import UserError, did_you_mean
from paddlemix.models.configuration import DecoderConfig, LlavaConfig, VisionConfig

if TYPE_CHECKING:
    from paddle import nn

Config = TypeVar("Config")
Shapes = dict[str, tuple[int, ...]]

# Source: lmsys/vicuna-7b-v1.5 config.json; Llama-2-7B's sizes (Touvron et al. 2023, "Llama 2", appendix A)
_VICUNA_7B = DecoderConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
)
# Source: lmsys/vicuna-13b-v1.5 config.json; Llama-2-13B's sizes
_VICUNA_13B = replace(
    _VICUNA_7B,
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=40,
)
# Source: openai/clip-vit-large-patch14 config.json, vision_config
_CLIP_L_224 = VisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=224,
    patch_size=14,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
)
# Source: openai/clip-vit-large-patch14-336 config.json, vision_config: the same at 336 pixels
_CLIP_L_336 = replace(_CLIP_L_224, image_size=336)


def _llava(text: DecoderConfig, image_newline: bool) -> LlavaConfig:
    """What all LLaVA releases below share: mlp2x_gelu on the patches of CLIP-L/336's last layer but one."""
    return LlavaConfig(
        text=text,
        vision=_CLIP_L_336,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        image_newline=image_newline,
    )


PRESETS: dict[str, LlavaConfig] = {
    # Source: liuhaotian/llava-v1.5-{7b,13b} config.json
    "llava-v1.5-7b": _llava(_VICUNA_7B, image_newline=False),
    "llava-v1.5-13b": _llava(_VICUNA_13B, image_newline=False),
    # Source: liuhaotian/llava-v1.6-vicuna-{7b,13b} config.json; mm_patch_merge_type "spatial_unpad" has the newline
    "llava-v1.6-vicuna-7b": _llava(_VICUNA_7B, image_newline=True),
    "llava-v1.6-vicuna-13b": _llava(_VICUNA_13B, image_newline=True),
    "vicuna-7b-v1.5": LlavaConfig(text=_VICUNA_7B),
    "vicuna-13b-v1.5": LlavaConfig(text=_VICUNA_13B),
}
TOWERS: dict[str, VisionConfig] = {
    "clip-vit-large-patch14": _CLIP_L_224,
    "clip-vit-large-patch14-336": _CLIP_L_336,
}
# Name it is published under -> its entry above.  Source: the Hugging Face repositories; PaddleMIX's documentation.
PUBLISHED_NAMES: dict[str, str] = {
    "liuhaotian/llava-v1.5-7b": "llava-v1.5-7b",
    "liuhaotian/llava-v1.5-13b": "llava-v1.5-13b",
    "liuhaotian/llava-v1.6-vicuna-7b": "llava-v1.6-vicuna-7b",
    "liuhaotian/llava-v1.6-vicuna-13b": "llava-v1.6-vicuna-13b",
    "lmsys/vicuna-7b-v1.5": "vicuna-7b-v1.5",
    "lmsys/vicuna-13b-v1.5": "vicuna-13b-v1.5",
    "openai/clip-vit-large-patch14": "clip-vit-large-patch14",
    "openai/clip-vit-large-patch14-336": "clip-vit-large-patch14-336",
    "paddlemix/llava/llava-v1.5-7b": "llava-v1.5-7b",
    "paddlemix/llava/llava-v1.5-13b": "llava-v1.5-13b",
    "paddlemix/llava/llava-v1.6-7b": "llava-v1.6-vicuna-7b",  # so in PaddleMIX's page for Ascend NPU
    "paddlemix/llava/llava-v1.6-vicuna-7b": "llava-v1.6-vicuna-7b",
    "paddlemix/llava/llava-v1.6-vicuna-13b": "llava-v1.6-vicuna-13b",
    "paddlemix/llava/vicuna-7b-v1.5": "vicuna-7b-v1.5",
    "paddlemix/llava/vicuna-13b-v1.5": "vicuna-13b-v1.5",
}
_ADAPTED = re.compile(r"language_model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight")


def preset(name: str) -> LlavaConfig:
    """Sizes of a published LLaVA or Vicuna model.

    Args:
        name: a key of `PRESETS`, or the name that it is published under (`PUBLISHED_NAMES`).

    Raises:
        UserError: no such entry; CLIP towers are in `tower_preset`.
    """
    return _find(name, PRESETS, "model")


def tower_preset(name: str) -> VisionConfig:
    """Sizes of a published CLIP tower; `name` is a key of `TOWERS` or a name of `PUBLISHED_NAMES`.

    Raises:
        UserError: no such entry.
    """
    return _find(name, TOWERS, "tower")


def _find(name: str, entries: dict[str, Config], kind: str) -> Config:
    key = PUBLISHED_NAMES.get(name, name)
    if key not in entries:
        published = [full for full, short in PUBLISHED_NAMES.items() if short in entries]
        allowed = [*entries, *published]
        raise UserError(f"{kind} preset '{name}' is not one of {', '.join(allowed)}{did_you_mean(name, allowed)}")
    return entries[key]


def parameter_shapes(config: LlavaConfig) -> Shapes:
    """Shapes of a model's weights without allocating any.

    Args:
        config: sizes.

    Returns:
        Name -> shape of every parameter that `LlavaModel(config)` has, in its order; linear weights are [in, out].
    """
    from paddlemix.models.llava import LlavaModel

    return _shapes_of(lambda: LlavaModel(config))


def tower_shapes(vision: VisionConfig) -> Shapes:
    """Shapes of all weights of a CLIP tower, also of those that no LLaVA model builds.

    Returns:
        Name -> shape as in transformers' CLIPVisionModel, under our names without `vision_tower.`.
    """
    from paddlemix.models.vision import VisionTower

    shapes = _shapes_of(lambda: VisionTower(vision, vision.num_hidden_layers, keep_class_token=True))
    norm = (vision.hidden_size,)
    return {**shapes, "post_layernorm.weight": norm, "post_layernorm.bias": norm}


def _shapes_of(build: Callable[[], nn.Layer]) -> Shapes:
    """Builds a layer whose weights stay unallocated.  Its names are numbered apart: a later model's are as without."""
    import paddle

    with paddle.LazyGuard(), paddle.utils.unique_name.guard():
        layer = build()
    return {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}


def count(shapes: Shapes) -> int:
    """Numbers in all weights together."""
    return sum(math.prod(shape) for shape in shapes.values())


def count_parameters(config: LlavaConfig) -> int:
    """Weights of a model as it is built: of the tower only the layers up to the selected one."""
    return count(parameter_shapes(config))


def count_lora_parameters(config: LlavaConfig, rank: int) -> int:
    """Weights of an adapter on every linear layer of the decoder, `lm_head` excepted, as LLaVA's own recipe has it.

    Args:
        rank: >= 1.
    """
    shapes = parameter_shapes(config)
    return sum(rank * sum(shape) for name, shape in shapes.items() if _ADAPTED.fullmatch(name))
