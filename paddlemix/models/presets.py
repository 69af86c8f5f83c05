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
from paddlemix.models.configuration import LlavaConfig, VisionConfig
from paddlemix.models.language_presets import LANGUAGE_MODEL_NAMES, LANGUAGE_MODELS

if TYPE_CHECKING:
    from paddle import nn

Config = TypeVar("Config")
Shapes = dict[str, tuple[int, ...]]

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
# Source: OpenGVLab/InternViT-6B-224px config.json; what it leaves out is InternVisionConfig's default
_INTERN_VIT_6B_224 = VisionConfig(
    hidden_size=3200,
    intermediate_size=12800,
    num_hidden_layers=48,
    num_attention_heads=25,
    image_size=224,
    patch_size=14,
    hidden_act="gelu",
    layer_norm_eps=1e-6,
    norm_type="rms_norm",
    qkv_bias=False,
    qk_normalization=True,
    layer_scale=0.1,
    outer_norms=False,
    patch_bias=True,
)
# Source: OpenGVLab/InternViT-6B-448px-V1-{0,2,5} config.json: the positions of 448 pixels; V1-2 and V1-5 leave out the
# three layers after the fourth from the end, whose features are read
_INTERN_VIT_6B_448 = replace(_INTERN_VIT_6B_224, image_size=448)
_INTERN_VIT_6B_448_V1_2 = replace(_INTERN_VIT_6B_448, num_hidden_layers=45)


def _llava(language_model: str, image_newline: bool) -> LlavaConfig:
    """What all LLaVA releases below share: mlp2x_gelu on the patches of CLIP-L/336's last layer but one."""
    return LlavaConfig(
        text=LANGUAGE_MODELS[language_model],
        vision=_CLIP_L_336,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        image_newline=image_newline,
    )


def _internvl(language_model: str, image_size: int = 336) -> LlavaConfig:
    """InternVL-Chat-LLaVA: the features of InternViT's fourth layer from the end, at 336 or 448 pixels."""
    tower = replace(_INTERN_VIT_6B_224, image_size=image_size)
    return replace(_llava(language_model, image_newline=False), vision=tower, mm_vision_select_layer=-4)


PRESETS: dict[str, LlavaConfig] = {
    # Source: liuhaotian/llava-v1.5-{7b,13b} config.json
    "llava-v1.5-7b": _llava("vicuna-7b-v1.5", image_newline=False),
    "llava-v1.5-13b": _llava("vicuna-13b-v1.5", image_newline=False),
    # Source: liuhaotian/llava-v1.6-vicuna-{7b,13b} config.json; mm_patch_merge_type "spatial_unpad" has the newline
    "llava-v1.6-vicuna-7b": _llava("vicuna-7b-v1.5", image_newline=True),
    "llava-v1.6-vicuna-13b": _llava("vicuna-13b-v1.5", image_newline=True),
    # Source: liuhaotian/llava-v1.6-{mistral-7b,34b} config.json
    "llava-v1.6-mistral-7b": _llava("mistral-7b-instruct-v0.2", image_newline=True),
    "llava-v1.6-34b": _llava("nous-hermes-2-yi-34b", image_newline=True),
    # Source: lmms-lab/llama3-llava-next-8b, lmms-lab/llava-next-{72b,110b} config.json
    "llama3-llava-next-8b": _llava("llama-3-8b-instruct", image_newline=True),
    "llava-next-72b": _llava("qwen1.5-72b-chat", image_newline=True),
    "llava-next-110b": _llava("qwen1.5-110b-chat", image_newline=True),
    # Source: xtuner/configs/llava of InternLM/xtuner, the fine-tuning recipes at 336 pixels
    "llava-internlm-7b": _llava("internlm-chat-7b", image_newline=False),
    "llava-internlm2-7b": _llava("internlm2-chat-7b", image_newline=False),
    "llava-internlm2-20b": _llava("internlm2-chat-20b", image_newline=False),
    "llava-llama-3-8b": _llava("llama-3-8b-instruct", image_newline=False),
    # Source: OpenGVLab/InternVL-Chat-ViT-6B-Vicuna-{7B,13B}; internvl_chat_llava's scripts, *_224to336_*
    "internvl-chat-vit-6b-vicuna-7b": _internvl("vicuna-7b-v1.5"),
    "internvl-chat-vit-6b-vicuna-13b": _internvl("vicuna-13b-v1.5"),
    # the same with the tower of 448 pixels, *_448_vicuna*
    "internvl-chat-vit-6b-vicuna-13b-448px": _internvl("vicuna-13b-v1.5", 448),
    **{name: LlavaConfig(text=text) for name, text in LANGUAGE_MODELS.items()},
}
TOWERS: dict[str, VisionConfig] = {
    "clip-vit-large-patch14": _CLIP_L_224,
    "clip-vit-large-patch14-336": _CLIP_L_336,
    "internvit-6b-224px": _INTERN_VIT_6B_224,
    "internvit-6b-448px-v1-0": _INTERN_VIT_6B_448,
    "internvit-6b-448px-v1-2": _INTERN_VIT_6B_448_V1_2,
    "internvit-6b-448px-v1-5": _INTERN_VIT_6B_448_V1_2,
}
# Name it is published under -> its entry above.  Source: the Hugging Face repositories; PaddleMIX's documentation.
PUBLISHED_NAMES: dict[str, str] = {
    "liuhaotian/llava-v1.5-7b": "llava-v1.5-7b",
    "liuhaotian/llava-v1.5-13b": "llava-v1.5-13b",
    "liuhaotian/llava-v1.6-vicuna-7b": "llava-v1.6-vicuna-7b",
    "liuhaotian/llava-v1.6-vicuna-13b": "llava-v1.6-vicuna-13b",
    "liuhaotian/llava-v1.6-mistral-7b": "llava-v1.6-mistral-7b",
    "liuhaotian/llava-v1.6-34b": "llava-v1.6-34b",
    "lmms-lab/llama3-llava-next-8b": "llama3-llava-next-8b",
    "lmms-lab/llava-next-72b": "llava-next-72b",
    "lmms-lab/llava-next-110b": "llava-next-110b",
    "xtuner/llava-internlm-7b": "llava-internlm-7b",
    "xtuner/llava-internlm2-7b": "llava-internlm2-7b",
    "xtuner/llava-internlm2-20b": "llava-internlm2-20b",
    "xtuner/llava-llama-3-8b": "llava-llama-3-8b",
    **LANGUAGE_MODEL_NAMES,
    "openai/clip-vit-large-patch14": "clip-vit-large-patch14",
    "openai/clip-vit-large-patch14-336": "clip-vit-large-patch14-336",
    "OpenGVLab/InternViT-6B-224px": "internvit-6b-224px",
    "OpenGVLab/InternViT-6B-448px": "internvit-6b-448px-v1-0",  # its name in InternVL-Chat-LLaVA's scripts
    "OpenGVLab/InternViT-6B-448px-V1-0": "internvit-6b-448px-v1-0",
    "OpenGVLab/InternViT-6B-448px-V1-2": "internvit-6b-448px-v1-2",
    "OpenGVLab/InternViT-6B-448px-V1-5": "internvit-6b-448px-v1-5",
    "OpenGVLab/InternVL-Chat-ViT-6B-Vicuna-7B": "internvl-chat-vit-6b-vicuna-7b",
    "OpenGVLab/InternVL-Chat-ViT-6B-Vicuna-13B": "internvl-chat-vit-6b-vicuna-13b",
    "OpenGVLab/InternVL-Chat-ViT-6B-Vicuna-13B-448px": "internvl-chat-vit-6b-vicuna-13b-448px",
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
        UserError: no such entry; towers are in `tower_preset`.
    """
    return _find(name, PRESETS, "model")


def tower_preset(name: str) -> VisionConfig:
    """Sizes of a published vision tower; `name` is a key of `TOWERS` or a name of `PUBLISHED_NAMES`.

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
    """Shapes of all weights of a tower, also of those that no LLaVA model builds.

    Returns:
        Name -> shape as in CLIPVisionModel or InternVisionModel, under our names without `vision_tower.`.
    """
    from paddlemix.models.vision import VisionTower

    shapes = _shapes_of(lambda: VisionTower(vision, vision.num_hidden_layers, keep_class_token=True))
    if not vision.outer_norms:
        return shapes
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
