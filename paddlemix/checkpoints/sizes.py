"""A model's sizes and processor from its configuration files alone: nothing is downloaded, no weight file is needed.

    read_sizes(BaseSpec(model="liuhaotian/llava-v1.5-7b")).config  # even if that model is not on this machine

For the dry run and other commands that must know a model without loading it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paddlemix.checkpoints.base_model import BaseSpec, attach_tower, check_tower
from paddlemix.checkpoints.hub.model_names import is_model_name
from paddlemix.checkpoints.hub.part_places import local_part
from paddlemix.checkpoints.hub.resolve import local_model
from paddlemix.checkpoints.layouts.config_readers import tower_sizes
from paddlemix.checkpoints.layouts.recognise import is_adapter, recognise
from paddlemix.checkpoints.layouts.towers import TOWER_KINDS, input_size, tower_form
from paddlemix.checkpoints.layouts.xtuner_layout import is_xtuner
from paddlemix.checkpoints.pretrained import load_processor
from paddlemix.checkpoints.quantized import choose_quantization
from paddlemix.checkpoints.source import Source, pick_sizes, with_image_size
from paddlemix.errors import MissingFileError, UserError
from paddlemix.models.configuration import LlavaConfig
from paddlemix.models.presets import PRESETS, PUBLISHED_NAMES, TOWERS
from paddlemix.paths import user_path
from paddlemix.peft.quantize import QuantizationConfig
from paddlemix.processors.llava import LlavaProcessor


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """What is known of a base without its weights.

    Args:
        config: complete sizes.
        processor: None without tokenizer files.
        quantization: how the language model's linear layers are stored; None: in floating point.
        origin: where the sizes come from, in words.
    """

    config: LlavaConfig
    processor: LlavaProcessor | None
    quantization: QuantizationConfig | None
    origin: str


def read_sizes(spec: BaseSpec) -> ModelSizes:
    """Sizes of the model that `load_base` would put together.

    Args:
        spec: the base.

    Raises:
        MissingFileError: it is neither a directory nor a model of `presets`.
        UserError: its files cannot be understood.
    """
    # | the model is               | sizes                       | processor                  |
    # |----------------------------|-----------------------------|----------------------------|
    # | a directory, or cached     | of its files                | of its files               |
    # | elsewhere, but published   | of its preset               | None                       |
    # | anything else              | an error                    |                            |
    source = declared_base(spec)
    if isinstance(source, Source):
        check_tower(source.config, spec)
        quantization = choose_quantization(source.directory, spec.quantize)
        return ModelSizes(
            config=source.config,
            processor=load_processor(source),
            quantization=quantization,
            origin=str(source.directory),
        )
    # a preset: what `attach_tower` and `with_image_size` do to files, done to sizes
    config = source
    if config.vision is None and spec.tower is not None:
        config = replace(
            config,
            vision=with_image_size(_open_tower(spec.tower), spec.vision_image_size).config.vision,
            mm_projector_type=spec.mm_projector_type,
            mm_vision_select_layer=spec.mm_vision_select_layer,
            mm_vision_select_feature=spec.mm_vision_select_feature,
            image_newline=spec.image_newline,
        )
    elif config.vision is not None and spec.vision_image_size is not None:
        config = replace(config, vision=replace(config.vision, image_size=spec.vision_image_size))
    check_tower(config, spec)
    quantization = None if spec.quantize is None else QuantizationConfig(kind=spec.quantize)
    origin = f"the sizes of {PUBLISHED_NAMES.get(spec.model, spec.model)}, which is not on this machine"
    return ModelSizes(config=config, processor=None, quantization=quantization, origin=origin)


def declared_base(spec: BaseSpec) -> Source | LlavaConfig:
    """The declared files of a base with its tower attached; a preset's sizes without files.

    Raises:
        MissingFileError, UserError: see `read_sizes`.
    """
    source = _open(spec.model)
    if not isinstance(source, Source):
        return source
    if source.config.vision is None and spec.tower is not None:
        return attach_tower(source, with_image_size(_open_tower(spec.tower), spec.vision_image_size), spec)
    return with_image_size(source, spec.vision_image_size)


def _open(name: str) -> Source | LlavaConfig:
    """A model's declared files, or a preset's sizes without files."""
    directory = _directory(name)
    if directory is None:
        preset = PRESETS.get(PUBLISHED_NAMES.get(name, name))
        if preset is None:
            raise MissingFileError(
                f"model '{name}' is not on this machine, and its sizes are not known; use a directory with its "
                f"config.json, or one of {', '.join(PRESETS)}"
            )
        return preset
    if is_adapter(directory):
        raise UserError(f"{directory} is an adapter, expected a whole model; set lora_path to it, and this to its base")
    if is_xtuner(directory):
        return Source.open(directory)
    layout = recognise(directory)
    if layout.kind in TOWER_KINDS:
        raise UserError(f"{directory} is a vision tower, expected a language model; set mm_vision_tower to it")
    source = Source(directory, layout.kind, layout.config, layout.processor, layout.keymaps)
    if layout.tower is None:
        return source
    # As `Source.open` completes it, but without asking which weights are inside: there may be none here.
    tower = _open_tower(layout.tower, directory)
    processor: dict[str, Any] = {**tower.processor, **source.processor, **pick_sizes(tower.processor)}
    vision = tower.config.vision
    assert vision is not None
    size = input_size(vision, source.processor.get("image_size"))
    whole = replace(source, config=replace(source.config, vision=vision), processor=processor)
    return whole if size == vision.image_size else with_image_size(whole, size)


def _open_tower(name: str, beside: Path | None = None) -> Source:
    """A vision tower's declared files, or a preset's sizes without files.

    Args:
        beside: the checkpoint that names it.
    """
    directory = local_part(beside, name) if beside is not None else _directory(name)
    if directory is not None:
        layout = recognise(directory)
        if layout.kind not in TOWER_KINDS:
            raise UserError(f"mm_vision_tower '{name}' is not a vision tower (its layout is {layout.kind})")
        return Source(directory, layout.kind, layout.config, layout.processor, layout.keymaps)
    vision = TOWERS.get(PUBLISHED_NAMES.get(name, name))
    if vision is None:  # neither here nor published
        raise MissingFileError(
            f"mm_vision_tower '{name}' is not on this machine, and its sizes are not known; use a directory with its "
            f"config.json, or one of {', '.join(TOWERS)}"
        )
    form = tower_form(vision)
    return Source(Path(name), form.kind, LlavaConfig(vision=vision), {**tower_sizes(vision), **form.pixels()}, ())


def _directory(name: str) -> Path | None:
    """A model's directory or the cache that has it; None without either."""
    path = user_path(name, "the model")
    if path.is_dir():
        return path
    return local_model(name) if is_model_name(name) else None
