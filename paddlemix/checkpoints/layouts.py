"""What a directory holds: its layout, recognised by content, and its declared facts in our terms.

No name or path of a directory decides anything.  Reads `config.json` and the processor files, no weights.

Sources: config.json of liuhaotian/llava-v1.5-7b, llava-v1.6-vicuna-7b, llava-hf/*, lmsys/vicuna-*, openai/clip-vit-*.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paddlemix.checkpoints.families import FAMILIES, LLAVA_ARCHITECTURES, find_family, read_text
from paddlemix.checkpoints.files import read_json
from paddlemix.checkpoints.keymap import (
    HF_NEW,
    HF_OLD,
    ORIGINAL,
    ORIGINAL_INTERN_VIT,
    OURS,
    PADDLEMIX,
    KeyMap,
)
from paddlemix.checkpoints.towers import CLIP_FORM, TOWER_FORMS
from paddlemix.checkpoints.xtuner import has_adapters
from paddlemix.errors import MissingFileError, UserError
from paddlemix.models.configuration import DecoderConfig, LlavaConfig, VisionConfig, pick_fields
from paddlemix.processors.llava import PROCESSOR_FILE

CONFIG_FILE, PREPROCESSOR_FILE, ADAPTER_FILE = "config.json", "preprocessor_config.json", "lora_config.json"
PEFT_ADAPTER_FILE = "adapter_config.json"
ADAPTER_PROCESSOR_FILE = "paddlemix_processor.json"  # ours beside another program's adapter: template and pixels
FORMAT_KEY, FORMAT_VERSION = "paddlemix_format", 1
TEMPLATE_KEY = "chat_template_name"  # our own key in config.json of layouts that have none
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
# a text-only model has no images; these stand in until a tower brings its own
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
        processor: content of a `processor_config.json`, as far as the files tell.
        tower: where the vision tower is when it is not inside: a path or a model name.
        tower_inside: whether tower weights inside the checkpoint win over those of `tower`.
        fused: which weights are joined, see `fused.split_fused`.
    """

    kind: str
    config: LlavaConfig
    keymaps: tuple[KeyMap, ...]
    processor: dict[str, Any]
    tower: str | None = None
    tower_inside: bool = True
    fused: tuple[str, ...] = ()


def recognise(directory: Path) -> Layout:
    """Reads what a model directory is.

    Args:
        directory: holds `config.json`.

    Raises:
        MissingFileError: no directory or no `config.json`.
        UserError: its content is of no known layout, or names something that is not supported.
    """
    if not directory.is_dir():
        raise MissingFileError(f"model directory '{directory}' does not exist (looked from {Path.cwd()})")
    config_path = directory / CONFIG_FILE
    if not config_path.is_file():
        found = ", ".join(sorted(path.name for path in directory.iterdir())[:8]) or "nothing"
        raise MissingFileError(f"no {CONFIG_FILE} in {directory}, so it is no model directory (it holds {found})")
    config = read_json(config_path)
    try:
        for matches, read in _READERS:
            if matches(config):
                return read(config, directory)
    except UserError as error:
        raise UserError(f"{config_path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, SyntaxError) as error:
        raise UserError(f"{config_path} cannot be understood: {error!r}") from error
    raise UserError(
        f"{config_path}: model_type '{config.get('model_type')}' with architectures {config.get('architectures')} is "
        "not supported; allowed: LLaVA (original, llava-hf, PaddleMIX, InternVL-Chat), a language model "
        f"({', '.join(FAMILIES)}), CLIP, InternViT"
    )


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter: ours, PaddleMIX's, original LLaVA's (PEFT) or XTuner's."""
    return any((directory / name).is_file() for name in (ADAPTER_FILE, PEFT_ADAPTER_FILE)) or has_adapters(directory)


def config_values(config: LlavaConfig) -> dict[str, Any]:
    """The content of our own `config.json`."""
    return {FORMAT_KEY: FORMAT_VERSION, "model_type": "paddlemix_llava", **config.to_dict()}


def read_processor_values(directory: Path) -> dict[str, Any]:
    """The processor values that an adapter's `config.json` declares, as far as it has one."""
    config = read_json(directory / CONFIG_FILE) if (directory / CONFIG_FILE).is_file() else {}
    values = {key: config.get(key) for key in ("image_aspect_ratio", "mm_patch_merge_type", "mm_vision_select_feature")}
    values["image_grid_pinpoints"] = _pinpoints(config.get("image_grid_pinpoints"))
    values |= {"chat_template": config.get(TEMPLATE_KEY), "mm_use_im_start_end": config.get("mm_use_im_start_end")}
    return {key: value for key, value in values.items() if value}


def _read_ours(config: Mapping[str, Any], directory: Path) -> Layout:
    if config[FORMAT_KEY] > FORMAT_VERSION:
        raise UserError(
            f"{FORMAT_KEY} {config[FORMAT_KEY]} is newer than this version reads ({FORMAT_VERSION}); update paddlemix"
        )
    processor_path = directory / PROCESSOR_FILE
    processor = read_json(processor_path) if processor_path.is_file() else {}
    return Layout("paddlemix", LlavaConfig.from_dict(config), (OURS,), processor)


def _read_original(config: Mapping[str, Any], directory: Path) -> Layout:
    """LLaVA's own files and PaddleMIX's, which share config.json and differ in the names of weights."""
    tower = config.get("mm_vision_tower")
    merge_type = config.get("mm_patch_merge_type") or "flat"
    text = read_text(config, find_family(config))
    layout_config = LlavaConfig(
        text=text,
        mm_projector_type=config.get("mm_projector_type") or "linear",
        mm_vision_select_layer=config.get("mm_vision_select_layer", -2),
        mm_vision_select_feature=config.get("mm_vision_select_feature") or "patch",
        image_newline="unpad" in merge_type,
    )
    processor = {
        "chat_template": _template(config, text),
        "image_aspect_ratio": config.get("image_aspect_ratio") or "square",
        "image_grid_pinpoints": _pinpoints(config.get("image_grid_pinpoints")),
        "mm_patch_merge_type": merge_type,
        "mm_vision_select_feature": layout_config.mm_vision_select_feature,
        "mm_use_im_start_end": bool(config.get("mm_use_im_start_end")),
    }
    return Layout(
        "original",
        layout_config,
        (PADDLEMIX, ORIGINAL_INTERN_VIT, ORIGINAL),  # ORIGINAL takes any name below "model." as the decoder's
        {**processor, **_preprocessor_values(directory)},
        tower=tower,
        tower_inside=bool(config.get("unfreeze_mm_vision_tower")),
        fused=tuple(option for option in FUSED_OPTIONS if config.get(option)),
    )


def _pinpoints(value: Any) -> Any:
    """LLaVA's trainer writes the list as text, "[(336, 672), ...]"."""
    return [list(pair) for pair in ast.literal_eval(value)] if isinstance(value, str) else value


def _read_hf(config: Mapping[str, Any], directory: Path) -> Layout:
    next_generation = config["model_type"] == "llava_next"
    feature = {"default": "patch", "full": "cls_patch"}[config.get("vision_feature_select_strategy", "default")]
    vision = pick_fields(VisionConfig, {**_HF_TOWER, **config["vision_config"]})
    layout_config = LlavaConfig(
        text=read_text({**config["text_config"], "tie_word_embeddings": _hf_tied(config)}),
        vision=vision,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=config.get("vision_feature_layer", -2),
        mm_vision_select_feature=feature,
        image_newline=next_generation,
    )
    processor = {
        "chat_template": _template(config, layout_config.text),
        # LLaVA-1.5 was trained on padded images
        "image_aspect_ratio": config.get("image_aspect_ratio") or ("anyres" if next_generation else "pad"),
        "image_grid_pinpoints": exchange_sides(config.get("image_grid_pinpoints")),
        "mm_patch_merge_type": "spatial_unpad" if next_generation else "flat",
        "mm_vision_select_feature": feature,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
    }
    return Layout("hf", layout_config, (HF_OLD, HF_NEW), {**processor, **_pixels(directory)})


def exchange_sides(pinpoints: list[list[int]] | None) -> list[list[int]] | None:
    """Grids of llava-hf, (height, width), as ours, (width, height), or back.

    A list that holds every grid both ways, as that of LLaVA-1.6 does, stays as it is: llava-hf's files took it over
    unchanged, and its order decides ties.
    """
    if pinpoints is None:
        return None
    turned = [[second, first] for first, second in pinpoints]
    same = sorted(turned) == sorted([first, second] for first, second in pinpoints)
    return [list(pinpoint) for pinpoint in pinpoints] if same else turned


def _hf_tied(config: Mapping[str, Any]) -> bool:
    return bool(config["text_config"].get("tie_word_embeddings", config.get("tie_word_embeddings", False)))


def _read_language(config: Mapping[str, Any], directory: Path) -> Layout:
    text = read_text(config)
    family = FAMILIES[text.model_type]
    return Layout(
        "language",
        LlavaConfig(text=text),
        (family.keymap, PADDLEMIX),  # PaddleNLP writes the same config.json with its own names of weights
        {"chat_template": _template(config, text)},
        fused=family.fused,
    )


def _template(config: Mapping[str, Any], text: DecoderConfig) -> str:
    """The conversation template that the files name, else that of the language model's family: LLaVA's and the
    families' own files do not say."""
    return config.get(TEMPLATE_KEY) or FAMILIES[text.model_type].template


def _is_tower(config: Mapping[str, Any]) -> bool:
    return any(config.get("model_type") in form.model_types for form in TOWER_FORMS)


def _read_tower(config: Mapping[str, Any], directory: Path) -> Layout:
    form = next(form for form in TOWER_FORMS if config["model_type"] in form.model_types)
    vision = form.read(config.get("vision_config", config))
    layout_config = LlavaConfig(vision=vision, mm_vision_select_layer=-1)
    pixels = {**form.pixels(), **_preprocessor_values(directory)}
    return Layout(form.kind, layout_config, form.keymaps, {**tower_sizes(vision), **pixels})


def _is_original(config: Mapping[str, Any]) -> bool:
    return "mm_vision_tower" in config or not LLAVA_ARCHITECTURES.isdisjoint(config.get("architectures") or [])


_READERS = (
    (lambda config: FORMAT_KEY in config, _read_ours),
    (lambda config: config.get("model_type") in ("llava", "llava_next") and "text_config" in config, _read_hf),
    (_is_original, _read_original),
    (lambda config: config.get("model_type") in FAMILIES, _read_language),
    (_is_tower, _read_tower),
)


def tower_sizes(vision: VisionConfig) -> dict[str, int]:
    """The processor values that a tower decides."""
    return {"image_size": vision.image_size, "patch_size": vision.patch_size}


def _pixels(directory: Path) -> dict[str, Any]:
    """What a directory declares about pixels; CLIP's numbers where it says nothing."""
    return {**CLIP_FORM.pixels(), **_preprocessor_values(directory)}


def _preprocessor_values(directory: Path) -> dict[str, Any]:
    """Mean, deviation and crop size as far as a `preprocessor_config.json` has them; PaddleMIX keeps one for training
    and one for inference in folders of their own."""
    places = (directory, directory / "processor" / "eval", directory / "processor" / "train")
    path = next((place / PREPROCESSOR_FILE for place in places if (place / PREPROCESSOR_FILE).is_file()), None)
    if path is None:
        return {}
    declared = read_json(path)
    values = {key: declared[key] for key in ("image_mean", "image_std") if declared.get(key)}
    crop = declared.get("crop_size")
    size = crop.get("height") if isinstance(crop, dict) else crop
    return {**values, "image_size": size} if size else values
