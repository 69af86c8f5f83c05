"""What a run starts from, as its configuration says: precision, base model, and how images and text are prepared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from paddlemix.checkpoints.adapters.adapter import read_adapter
from paddlemix.checkpoints.adapters.adapter_processor import adapter_processor
from paddlemix.checkpoints.adapters.image_padding import warn_of_padding
from paddlemix.checkpoints.base_model import BaseSpec
from paddlemix.checkpoints.hub.model_names import is_model_name
from paddlemix.checkpoints.hub.resolve import local_model, resolve_model
from paddlemix.checkpoints.load import load_base
from paddlemix.checkpoints.pretrained import Pretrained
from paddlemix.checkpoints.quantized import choose_quantization
from paddlemix.checkpoints.sizes import read_sizes
from paddlemix.config.less_memory import less_memory_in_run
from paddlemix.config.schema import RunConfig
from paddlemix.errors import UserError
from paddlemix.models.configuration import LlavaConfig
from paddlemix.parallel.layout import Layout
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.processors.run_processor import VisionSizes, run_processor
from paddlemix.trainer.checks import started_processes, warn_of_xtuner


def compute_dtype(config: RunConfig) -> str:
    """The type that products are computed in: "float32", "bfloat16" or "float16"."""
    return "bfloat16" if config.bf16 else "float16" if config.fp16 else config.dtype or "float32"


def weight_dtype(config: RunConfig) -> str:
    """The type that weights are held in."""
    if config.dtype is not None:
        return config.dtype
    # O1 casts per operator and holds float32 weights; O2 holds them narrow.
    return compute_dtype(config) if config.fp16_opt_level == "O2" else "float32"


def remedies(config: RunConfig) -> Iterator[str]:
    """What would need less memory, for an error.  Nothing is read before the first line is used."""
    directory, quantization = _directory(config), None
    with contextlib.suppress(UserError):  # the run ends by another error
        quantization = None if directory is None else choose_quantization(directory, config.quantize_base)
    yield from less_memory_in_run(config, quantization is not None, started_processes())
    yield "--dry-run shows what takes how much"


def base_spec(config: RunConfig) -> BaseSpec:
    """The parts that the model is put together from."""
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
        starts_projector=config.language_model == "frozen" and config.projector == "full",
        # Keys that are not set leave BaseSpec's defaults.
        **{key: value for key, value in given.items() if value is not None},  # type: ignore[arg-type]
    )


def processor_of_run(config: RunConfig, base: LlavaProcessor | None, sizes: LlavaConfig) -> LlavaProcessor | None:
    """The processor that a run uses, see `run_processor`.

    Args:
        base: of the base model, None where it has no tokenizer.
        sizes: of the base model, its tower included.

    Returns:
        None where there is no tokenizer.

    Raises:
        MissingFileError, UserError: `lora_path` is not an adapter, or a key does not fit the model.
    """
    processor = base
    # The adapter was trained with its own template and tile size, which win over the base's.
    if config.lora_path:
        processor = adapter_processor(base, read_adapter(Path(config.lora_path)))
    if processor is None:
        return None
    vision = sizes.vision
    sight = VisionSizes(image_size=None if vision is None else vision.image_size, image_newline=sizes.image_newline)
    result = run_processor(processor, config, sight)
    warn_of_xtuner(config, result, sizes)
    directory = _directory(config)
    # A key that is set is a decision; only a silent difference deserves a warning.
    if directory is not None and config.image_aspect_ratio is None:
        warn_of_padding(directory, result)
    return result


def required_processor(config: RunConfig, base: LlavaProcessor | None, sizes: LlavaConfig) -> LlavaProcessor:
    """As `processor_of_run`, but a model without a tokenizer is an error.

    Raises:
        MissingFileError, UserError: see there; or there are no tokenizer files.
    """
    processor = processor_of_run(config, base, sizes)
    if processor is None:
        raise UserError(
            f"{config.model_name_or_path} has no tokenizer files; copy tokenizer.model from the model it was made from"
        )
    return processor


def load_start(config: RunConfig, layout: Layout) -> tuple[BaseSpec, Pretrained, LlavaProcessor]:
    """What a run starts from, with its weights and its processor.

    Raises:
        MissingFileError, UserError: see `load_base` and `required_processor`.
    """
    spec = base_spec(config)
    # Where processes slice the weights, none of them ever has the whole model.  A new adapter of two kinds is computed
    # from the weights that it adapts.
    needs_weights = config.lora_path is None and (config.use_dora or config.pissa)
    defers = layout.stage == "stage3" and config.do_train and not needs_weights
    loaded = load_base(spec, weight_dtype(config), defers, layout)
    processor = loaded.processor = required_processor(config, loaded.processor, loaded.model.config)
    return spec, loaded, processor


def _directory(config: RunConfig) -> Path | None:
    """Where the base model is on this machine; None where it is not yet."""
    name = str(config.model_name_or_path)
    return Path(name) if Path(name).is_dir() else local_model(name) if is_model_name(name) else None


def declared_processor(config: RunConfig) -> LlavaProcessor:
    """The processor of a run, without loading its model, whose files are found or downloaded.

    Raises:
        MissingFileError, UserError: see `processor_of_run`; or there are no tokenizer files.
    """
    spec = base_spec(config)
    tower = None if spec.tower is None else str(resolve_model(spec.tower))
    # Names are resolved first, because sizes are read from files.
    sizes = read_sizes(replace(spec, model=str(resolve_model(spec.model)), tower=tower))
    return required_processor(config, sizes.processor, sizes.config)
