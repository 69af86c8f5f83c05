"""The `config.json` and processor files of each kind of layout, read into our terms; no weights.

Sources: config.json of liuhaotian/llava-v1.5-7b, llava-v1.6-vicuna-7b, llava-hf/*, lmsys/vicuna-*, openai/clip-vit-*.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paddlemix.checkpoints.files.weight_files import read_json
from paddlemix.checkpoints.layouts.config_keys import (
    CLIP_KEYS,
    FORMAT_KEY,
    FORMAT_VERSION,
    HF_KEYS,
    HF_VISION_KEYS,
    LANGUAGE_KEYS,
    ORIGINAL_KEYS,
    OURS_KEYS,
    PROCESSOR_KEYS,
    TEMPLATE_KEY,
    TEXT_KEYS,
    VISION_KEYS,
)
from paddlemix.checkpoints.layouts.end_tokens import declared_ends
from paddlemix.checkpoints.layouts.families import FAMILIES, find_family, read_text
from paddlemix.checkpoints.layouts.image_settings import check_hf_processor, exchange_sides, read_pixels, same_pinpoints
from paddlemix.checkpoints.layouts.towers import CLIP_FORM, TOWER_FORMS
from paddlemix.checkpoints.layouts.weight_names import (
    HF_5_SAVED,
    HF_NEW,
    HF_OLD,
    ORIGINAL,
    ORIGINAL_INTERN_VIT,
    OURS,
    PADDLEMIX,
    KeyMap,
)
from paddlemix.declared import take, without_null
from paddlemix.errors import UserError
from paddlemix.models.configuration import DecoderConfig, LlavaConfig, VisionConfig, pick_fields
from paddlemix.processors.llava import PROCESSOR_FILE
from paddlemix.processors.text.declared_template import template_by_markers

FUSED_OPTIONS = ("fuse_attention_qkv", "fuse_attention_ffn")

# vision_config of llava-hf files leaves out what equals transformers' LlavaConfig default, CLIP ViT-L/14-336
_HF_TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
# a text-only model has no images; these values are placeholders until a tower brings its own
NO_TOWER: dict[str, Any] = {
    "image_size": 336,
    "patch_size": 14,
    "image_aspect_ratio": "pad",
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


@dataclass(frozen=True)
class Layout:
    """A directory's declared facts.

    Args:
        kind: "paddlemix", "original", "hf", "language" for a language model alone, or that of a tower alone, "clip" or
            "intern_vit".
        config: sizes; without a tower for "language" and where an original checkpoint's tower is elsewhere.
        keymaps: names its weights may have; the first that knows all of them is used.
        processor: content of a `processor_config.json`, as far as the files declare it.
        tower: where the vision tower is if not inside: a path or a model name.
        tower_inside: whether tower weights inside the checkpoint take precedence over those of `tower`.
        fused: which weights are joined, see `joined_weights.split_fused`.
    """

    kind: str
    config: LlavaConfig
    keymaps: tuple[KeyMap, ...]
    processor: dict[str, Any]
    tower: str | None = None
    tower_inside: bool = True
    fused: tuple[str, ...] = ()


def tower_sizes(vision: VisionConfig) -> dict[str, int]:
    """The processor values that a tower decides."""
    return {"image_size": vision.image_size, "patch_size": vision.patch_size}


def _text_part(values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The language model's part of a config.json."""
    part: Mapping[str, Any] | None = values.get("text_config")
    if part is None:
        raise UserError(f"{where} has no text_config, the sizes of the language model; copy it from the original model")
    return part


def read_ours(config: Mapping[str, Any], directory: Path, where: str) -> Layout:
    values = take(config, OURS_KEYS, where)
    if values[FORMAT_KEY] > FORMAT_VERSION:
        raise UserError(
            f"{FORMAT_KEY} {values[FORMAT_KEY]} is newer than this version reads ({FORMAT_VERSION}); update paddlemix"
        )
    text = take(_text_part(values, where), TEXT_KEYS, f"{where}: text_config")
    vision = values.get("vision_config")
    if vision is not None:
        vision = take(vision, VISION_KEYS, f"{where}: vision_config")
    processor_path = directory / PROCESSOR_FILE
    processor = take(read_json(processor_path), PROCESSOR_KEYS, str(processor_path)) if processor_path.is_file() else {}
    layout_config = LlavaConfig.from_dict({**values, "text_config": text, "vision_config": vision})
    # our processor file wins: a run may have chosen other tokens that end an answer
    ends = declared_ends(values, directory, layout_config.text.vocab_size)
    processor = {**({"eos_token_id": ends} if ends else {}), **processor}
    return Layout("paddlemix", layout_config, (OURS,), processor)


def read_original(config: Mapping[str, Any], directory: Path, where: str) -> Layout:
    """LLaVA's own files and PaddleMIX's, which share config.json and differ in the names of weights."""
    values = take(config, ORIGINAL_KEYS, where)
    merge_type = values.get("mm_patch_merge_type", "flat")
    text = read_text(config, find_family(config))
    layout_config = LlavaConfig(
        text=text,
        mm_projector_type=values.get("mm_projector_type") or "linear",  # the first LLaVA had no such key
        mm_vision_select_layer=values.get("mm_vision_select_layer", -2),
        mm_vision_select_feature=values.get("mm_vision_select_feature", "patch"),
        image_newline="unpad" in merge_type,
    )
    processor = {
        **_text_values(values, text, directory, None if text.model_type == "qwen2" else _LLAVA_SPELLING),
        "image_aspect_ratio": values.get("image_aspect_ratio") or "square",
        "mm_patch_merge_type": merge_type,
        "mm_vision_select_feature": layout_config.mm_vision_select_feature,
        "mm_use_im_start_end": values.get("mm_use_im_start_end", False),
    }
    # LLaVA takes the aspect ratio from config.json alone, the other pixels from the tower's file or one beside it.
    pixels = {key: value for key, value in read_pixels(directory).items() if key != "image_aspect_ratio"}
    pixels |= same_pinpoints(values.get("image_grid_pinpoints"), pixels.get("image_grid_pinpoints"))
    return Layout(
        "original",
        layout_config,
        (PADDLEMIX, ORIGINAL_INTERN_VIT, ORIGINAL),  # ORIGINAL takes any name below "model." as the decoder's
        {**processor, **pixels},
        tower=values.get("mm_vision_tower"),
        tower_inside=values.get("unfreeze_mm_vision_tower", False),
        fused=tuple(option for option in FUSED_OPTIONS if values.get(option)),
    )


def read_hf(config: Mapping[str, Any], directory: Path, where: str) -> Layout:
    # llava_next is LLaVA-1.6: tiles and a newline vector
    values = take(config, HF_KEYS, where)
    next_generation = values["model_type"] == "llava_next"
    strategy = values.get("vision_feature_select_strategy", "default")
    feature = {"default": "patch", "full": "cls_patch"}[strategy]
    vision = take(values.get("vision_config", {}), HF_VISION_KEYS, f"{where}: vision_config")
    tower = pick_fields(VisionConfig, {**_HF_TOWER, **vision})
    check_hf_processor(directory, tower.patch_size, strategy)
    # the outer file decides about tying unless the inner one says it
    part = _text_part(values, where)
    text = {"tie_word_embeddings": values.get("tie_word_embeddings", False), **without_null(part)}
    layout_config = LlavaConfig(
        text=read_text({**part, **text}, where=f"{where}: text_config"),
        vision=tower,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=values.get("vision_feature_layer", -2),
        mm_vision_select_feature=feature,
        image_newline=next_generation,
    )
    pixels = {**CLIP_FORM.pixels(), **read_pixels(directory)}
    pinpoints = same_pinpoints(values.get("image_grid_pinpoints"), pixels.get("image_grid_pinpoints"))
    processor = {
        **_text_values({**without_null(part), **values}, layout_config.text, directory),
        # LLaVA-1.5 was trained on padded images
        "image_aspect_ratio": "anyres" if next_generation else "pad",
        "mm_patch_merge_type": "spatial_unpad" if next_generation else "flat",
        "mm_vision_select_feature": feature,
        **tower_sizes(tower),
        **pixels,
        "image_grid_pinpoints": exchange_sides(pinpoints["image_grid_pinpoints"]),
    }
    if "image_aspect_ratio" in values:  # what our own conversion wrote
        processor["image_aspect_ratio"] = values["image_aspect_ratio"]
    return Layout("hf", layout_config, (HF_OLD, HF_NEW, HF_5_SAVED), processor)


def read_language(config: Mapping[str, Any], directory: Path, where: str) -> Layout:
    values = take(config, LANGUAGE_KEYS, where)
    text = read_text(config)
    family = FAMILIES[text.model_type]
    return Layout(
        "language",
        LlavaConfig(text=text),
        (family.keymap, PADDLEMIX),  # PaddleNLP writes the same config.json with its own names of weights
        _text_values(values, text, directory),
        fused=family.fused,
    )


# LLaVA trains every ChatML model on its own spelling, whatever the tokenizer says.  Source: llava/eval/run_llava.py
_LLAVA_SPELLING = {"qwen_1_5": "chatml_direct"}


def _text_values(
    config: Mapping[str, Any], text: DecoderConfig, directory: Path, variants: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The conversation template that the files name, else the one that their chat template resembles, else that of the
    language model's family, since LLaVA's and the families' own files name none; and the tokens that end an answer."""
    template = config.get(TEMPLATE_KEY) or template_by_markers(directory, FAMILIES[text.model_type].template, variants)
    ends = declared_ends(config, directory, text.vocab_size)
    return {"chat_template": template, **({"eos_token_id": ends} if ends else {})}


def read_tower(config: Mapping[str, Any], directory: Path, where: str) -> Layout:
    form = next(form for form in TOWER_FORMS if config["model_type"] in form.model_types)
    if config["model_type"] == "clip":  # with its text model; of two copies, in old files, the second counts
        parts = take(config, CLIP_KEYS, where)
        declared = {**parts.get("vision_config", {}), **without_null(parts.get("vision_config_dict", {}))}
    else:
        declared = dict(config)
    vision = form.read(declared, where)
    # -1, so that all layers are built: which one a LLaVA model reads is not the tower's to say
    layout_config = LlavaConfig(vision=vision, mm_vision_select_layer=-1)
    pixels = {**form.pixels(), **read_pixels(directory)}
    return Layout(form.kind, layout_config, form.keymaps, {**tower_sizes(vision), **pixels})
