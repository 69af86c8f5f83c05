"""What a run starts from, as its configuration says: precision, base model, and how images and text are prepared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from paddlemix.checkpoints.hub import is_model_name, local_model
from paddlemix.checkpoints.load import BaseSpec
from paddlemix.checkpoints.quantized import choose_quantization
from paddlemix.config.less_memory import less_memory_in_run
from paddlemix.config.schema import RunConfig
from paddlemix.errors import UserError
from paddlemix.models.configuration import LlavaConfig
from paddlemix.processors.chat_template import resolve_template
from paddlemix.processors.llava import LlavaProcessor, image_spec_from_dict
from paddlemix.trainer.run_checks import process_count


def compute_dtype(config: RunConfig) -> str:
    """What products are computed in: "float32", "bfloat16" or "float16"."""
    return "bfloat16" if config.bf16 else "float16" if config.fp16 else config.dtype or "float32"


def weight_dtype(config: RunConfig) -> str:
    """What weights are held in."""
    if config.dtype is not None:
        return config.dtype
    return compute_dtype(config) if config.fp16_opt_level == "O2" else "float32"


def remedies(config: RunConfig) -> Iterator[str]:
    """What would take less memory, for an error; nothing is read before the first one is asked for."""
    name, quantization = str(config.model_name_or_path), None
    directory = Path(name) if Path(name).is_dir() else local_model(name) if is_model_name(name) else None
    with contextlib.suppress(UserError):  # the run ends by another error
        quantization = None if directory is None else choose_quantization(directory, config.quantize_base)
    yield from less_memory_in_run(config, quantization is not None, process_count())
    yield "--dry-run says what takes how much"


def base_spec(config: RunConfig) -> BaseSpec:
    """What the model is put together from."""
    given = {
        "mm_projector_type": config.mm_projector_type,
        "mm_vision_select_layer": config.mm_vision_select_layer,
        "mm_vision_select_feature": config.mm_vision_select_feature,
        "vision_image_size": config.vision_image_size,
    }
    return BaseSpec(
        model=str(config.model_name_or_path),
        tower=config.mm_vision_tower,
        projector_file=config.pretrain_mm_mlp_adapter,
        image_newline="unpad" in (config.mm_patch_merge_type or ""),
        quantize=config.quantize_base,
        **{key: value for key, value in given.items() if value is not None},  # type: ignore[arg-type]
    )


def adjusted_processor(processor: LlavaProcessor, config: RunConfig, sizes: LlavaConfig) -> LlavaProcessor:
    """The checkpoint's processor with what the run's configuration says otherwise.

    Raises:
        UserError: the model has no vector for the ends of rows, or a key's value does not fit another's.
    """
    keys = ("image_aspect_ratio", "image_grid_pinpoints", "mm_patch_merge_type")
    changes = {key: getattr(config, key) for key in keys if getattr(config, key) is not None}
    spec = image_spec_from_dict({**processor.to_dict(), **changes})
    needs_newline = spec.aspect_mode == "anyres" and "unpad" in spec.merge_type
    if needs_newline and sizes.vision is not None and not sizes.image_newline:
        raise UserError(
            f"mm_patch_merge_type '{spec.merge_type}' needs a model with an image_newline vector (LLaVA-1.6); "
            f"{config.model_name_or_path} has none, use 'spatial' or 'flat'"
        )
    template = resolve_template(config.chat_template) if config.chat_template else processor.template
    return replace(processor, image_spec=spec, template=template)
