"""What we know of a model as the declared files of the other layouts: config.json and the processor files.

The reverse of `config_readers.py`; keys are those of the reference's own files.  Knows no weights.
Sources: config.json and processor files of liuhaotian/llava-v1.5-7b, llava-v1.6-vicuna-7b and llava-hf/*.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paddlemix.checkpoints.layouts.added_rows import IMAGE_TOKEN, HfVocabulary
from paddlemix.checkpoints.layouts.config_keys import BASE_KEY, TEMPLATE_KEY
from paddlemix.checkpoints.layouts.config_readers import NO_TOWER
from paddlemix.checkpoints.layouts.families import FAMILIES, inside_llava, write_text
from paddlemix.checkpoints.layouts.image_settings import exchange_sides
from paddlemix.checkpoints.layouts.towers import CLIP_FORM, tower_form
from paddlemix.checkpoints.layouts.xtuner_layout import MODEL_TYPE, SELECT_LAYER
from paddlemix.errors import UserError
from paddlemix.models.configuration import LlavaConfig, VisionConfig, projector_depth
from paddlemix.processors.images.image_config import image_spec_from_dict
from paddlemix.processors.text.chat_template import read_template

TOWER_DIRECTORY = "vision_tower"
_OUTER_KEYS = ("architectures", "torch_dtype")  # not repeated inside another config.json


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything that the declared files of any layout are written from.

    Args:
        config: sizes.
        processor: content of our `processor_config.json`.
        special_ids: `bos_token_id`, `eos_token_id`, which may be a list, and `pad_token_id`, as far as they are known.
        dtype: of the weights, e.g. "float16".
    """

    config: LlavaConfig
    processor: dict[str, Any]
    special_ids: dict[str, int | list[int]]
    dtype: str

    @property
    def anyres(self) -> bool:
        """Whether images are tiled, as LLaVA-1.6 does."""
        return self.processor["image_aspect_ratio"] == "anyres"


def complete_processor(config: LlavaConfig, processor: dict[str, Any]) -> dict[str, Any]:
    """Processor values with every key, checked.

    Raises:
        UserError: a value is not allowed.
    """
    # keys that older processor files lack, with the values that they imply
    values = {
        **({} if config.vision is not None else NO_TOWER),
        "image_grid_pinpoints": None,
        "mm_patch_merge_type": "flat",
        "mm_vision_select_feature": config.mm_vision_select_feature,
        **processor,
    }
    try:
        spec = image_spec_from_dict(values)
        read_template(values["chat_template"])
    except KeyError as error:
        raise UserError(f"the processor's settings have no key {error}") from error
    values["image_grid_pinpoints"] = [list(pinpoint) for pinpoint in spec.grid_pinpoints] or None
    return values


def original_config(facts: Facts) -> dict[str, Any]:
    """config.json of `LlavaLlamaForCausalLM` or the like; the tower is in a folder beside it."""
    config, processor = facts.config, facts.processor
    # there is no LLaVA on InternLM: it is written as the Llama that computes the same
    text = inside_llava(config.text)
    llava = FAMILIES[text.model_type].llava
    assert config.vision is not None and llava is not None
    return {
        **write_text(text),
        **facts.special_ids,
        "architectures": [llava[1]],
        "model_type": llava[0],
        "torch_dtype": facts.dtype,
        "mm_hidden_size": config.vision.hidden_size,
        "mm_projector_type": config.mm_projector_type,
        "mm_vision_tower": TOWER_DIRECTORY,
        # the weights inside are the tower's; LLaVA reads them from there only with this key
        "unfreeze_mm_vision_tower": True,
        "mm_vision_select_layer": config.mm_vision_select_layer,
        "mm_vision_select_feature": config.mm_vision_select_feature,
        "mm_patch_merge_type": processor["mm_patch_merge_type"],
        "image_aspect_ratio": processor["image_aspect_ratio"],
        **({"image_grid_pinpoints": processor["image_grid_pinpoints"]} if processor["image_grid_pinpoints"] else {}),
        "mm_use_im_start_end": bool(processor.get("mm_use_im_start_end")),
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": config.text.max_position_embeddings,
        TEMPLATE_KEY: processor["chat_template"],
    }


def language_config(facts: Facts) -> dict[str, Any]:
    """config.json of just a language model, as its family writes it."""
    return {
        **write_text(facts.config.text),
        **facts.special_ids,
        "architectures": [FAMILIES[facts.config.text.model_type].architecture],
        "torch_dtype": facts.dtype,
        TEMPLATE_KEY: facts.processor["chat_template"],
    }


def tower_config(vision: VisionConfig, dtype: str) -> dict[str, Any]:
    """config.json of a tower on its own: a `CLIPVisionModel` or an `InternVisionModel`.

    Raises:
        UserError: it is neither.
    """
    # projection_dim is a key of CLIP's files alone, without effect on the tower
    values = tower_form(vision).write(vision, dtype)
    return {**values, "projection_dim": vision.hidden_size} if vision.outer_norms else values


def tower_preprocessor(processor: dict[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json of a tower; InternViT's is a `CLIPImageProcessor` too, with other numbers."""
    size = processor["image_size"]
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": processor.get("do_normalize", True),
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(processor["image_mean"]),
        "image_std": list(processor["image_std"]),
        "resample": processor.get("resample", 3),
        "rescale_factor": processor.get("rescale_factor", 1 / 255),
        "size": processor.get("size", {"shortest_edge": size}),
    }


def check_hf(facts: Facts) -> None:
    """Checks that llava-hf can represent a model.

    Raises:
        UserError: lists what it cannot represent.
    """
    config, processor, faults = facts.config, facts.processor, []
    if config.vision is not None and tower_form(config.vision) is not CLIP_FORM:
        faults.append("an InternViT tower (only CLIP)")
    if config.mm_projector_type != "mlp2x_gelu":
        faults.append(f"mm_projector_type '{config.mm_projector_type}' (only mlp2x_gelu)")
    # its Next processor always unpads and always appends the newline
    if facts.anyres and not (config.image_newline and processor["mm_patch_merge_type"] == "spatial_unpad"):
        faults.append(f"mm_patch_merge_type '{processor['mm_patch_merge_type']}' with anyres (only spatial_unpad)")
    if processor.get("mm_use_im_start_end"):
        faults.append("mm_use_im_start_end (its prompts have no tokens around an image)")
    if faults:
        raise UserError(f"llava-hf has no place for {'; '.join(faults)}; use --to llava or --to paddlemix")


def hf_config(facts: Facts, vocabulary: HfVocabulary) -> dict[str, Any]:
    """config.json of `LlavaForConditionalGeneration` or `LlavaNextForConditionalGeneration`."""
    config, processor = facts.config, facts.processor
    assert config.vision is not None
    text = {**write_text(inside_llava(config.text)), **facts.special_ids, "torch_dtype": facts.dtype}
    vision = {key: value for key, value in tower_config(config.vision, facts.dtype).items() if key not in _OUTER_KEYS}
    # llava-hf says in its own words whether the class token is among the features
    strategy = {"patch": "default", "cls_patch": "full"}[config.mm_vision_select_feature]
    return {
        "architectures": [f"Llava{'Next' if facts.anyres else ''}ForConditionalGeneration"],
        "model_type": "llava_next" if facts.anyres else "llava",
        "torch_dtype": facts.dtype,
        "ignore_index": -100,
        "image_token_index": vocabulary.image_token,
        "pad_token_id": hf_pad_token(facts, vocabulary),
        "image_seq_length": config.tokens_per_tile,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.mm_vision_select_layer,
        "vision_feature_select_strategy": strategy,
        **({"image_grid_pinpoints": exchange_sides(processor["image_grid_pinpoints"])} if facts.anyres else {}),
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "text_config": {**text, "vocab_size": vocabulary.size},
        "vision_config": vision,
        "image_aspect_ratio": processor["image_aspect_ratio"],
        TEMPLATE_KEY: processor["chat_template"],
        BASE_KEY: vocabulary.base,
    }


def xtuner_faults(config: LlavaConfig, processor: Mapping[str, Any]) -> list[str]:
    """What XTuner's own form cannot represent, "image_aspect_ratio 'square' (only 'pad')"; [] for nothing."""
    # value here, the only one that XTuner's code has: none of its files could say otherwise
    found = {
        "mm_vision_select_layer": (config.mm_vision_select_layer, SELECT_LAYER),
        "mm_vision_select_feature": (config.mm_vision_select_feature, "patch"),
        "image_aspect_ratio": (processor["image_aspect_ratio"], "pad"),
        "image_newline": (config.image_newline, False),
        "mm_use_im_start_end": (bool(processor.get("mm_use_im_start_end")), False),
    }
    faults = [f"{key} {value!r} (only {only!r})" for key, (value, only) in found.items() if value != only]
    if not config.mm_projector_type.startswith("mlp"):
        faults.append(f"mm_projector_type {config.mm_projector_type!r} (only mlpNx_gelu)")
    return faults


def check_xtuner(facts: Facts) -> None:
    """Checks that XTuner's own form can represent a model.

    Raises:
        UserError: lists what it cannot represent.
    """
    faults = xtuner_faults(facts.config, facts.processor)
    if faults:
        raise UserError(
            f"XTuner's form has no place for {'; '.join(faults)}: XTuner's answers would not match the training; "
            "train with these values for --to xtuner, or use --to llava or --to paddlemix"
        )


def xtuner_projector_config(facts: Facts) -> dict[str, Any]:
    """config.json of the projector that XTuner keeps separately.  Source: its ProjectorConfig."""
    config = facts.config
    assert config.vision is not None
    return {
        "architectures": ["ProjectorModel"],
        "model_type": MODEL_TYPE,
        "torch_dtype": facts.dtype,
        "visual_hidden_size": config.vision.hidden_size,
        "llm_hidden_size": config.text.hidden_size,
        "depth": projector_depth(config.mm_projector_type),
        "hidden_act": "gelu",
        "bias": True,
    }


def hf_pad_token(facts: Facts, vocabulary: HfVocabulary) -> int | None:
    """Id of `<pad>`, right after `<image>` if rows were added, else the model's own, if it has one."""
    own = facts.special_ids.get("pad_token_id")
    return vocabulary.image_token + 1 if vocabulary.rows else own if isinstance(own, int) else None


def hf_processor_files(facts: Facts) -> dict[str, dict[str, Any]]:
    """preprocessor_config.json and processor_config.json of llava-hf."""
    config, processor = facts.config, facts.processor
    assert config.vision is not None
    name = "LlavaNextProcessor" if facts.anyres else "LlavaProcessor"
    pixels = {**tower_preprocessor(processor), "processor_class": name}
    # | pictures | class                    |
    # |----------|--------------------------|
    # | tiled    | LlavaNextImageProcessor  |
    # | padded   | LlavaImageProcessor      |
    # | others   | CLIPImageProcessor       |
    if facts.anyres:
        pixels["image_processor_type"] = "LlavaNextImageProcessor"
        pixels |= {"do_pad": True, "image_grid_pinpoints": exchange_sides(processor["image_grid_pinpoints"])}
    elif processor["image_aspect_ratio"] == "pad":
        pixels |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    return {
        "preprocessor_config.json": pixels,
        "processor_config.json": {
            "processor_class": name,
            "image_token": IMAGE_TOKEN,
            "num_additional_image_tokens": 1,
            "patch_size": config.vision.patch_size,
            "vision_feature_select_strategy": "full" if config.mm_vision_select_feature == "cls_patch" else "default",
        },
    }
