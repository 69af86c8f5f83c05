"""The processor of a checkpoint or of a run, without weights, for the commands that read data.

| what is read | how |
|---|---|
| a directory of our own layout | its `processor_config.json` and `config.json` alone, without loading paddle |
| another layout, an adapter, a text-only model that gets a tower | by `checkpoints/`, which loads paddle (2 s) |
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from paddlemix.config.foreign.templates import XTUNER_TEMPLATES
from paddlemix.config.schema import RunConfig
from paddlemix.declared import Keys, flag, integer, mapping, take, without_null
from paddlemix.errors import UserError
from paddlemix.json_files import read_object
from paddlemix.processors.llava import PROCESSOR_FILE, LlavaProcessor, processor_from_dict
from paddlemix.processors.run_processor import VisionSizes, run_processor
from paddlemix.processors.text.chat_template import resolve_template
from paddlemix.processors.text.known_templates import choose_template
from paddlemix.processors.text.template import Template

if TYPE_CHECKING:
    from paddlemix.checkpoints.base_model import BaseSpec

_OURS = {"chat_template", "image_aspect_ratio", "image_size", "patch_size"}  # llava-hf's file of this name lacks them
# of our own config.json, what decides about images
_SIGHT_KEYS = Keys({"vision_config": mapping, "image_newline": flag})
_VISION_KEYS = Keys({"image_size": integer(1, 1 << 16)})


def open_processor(path: str, template: str | None = None) -> LlavaProcessor:
    """Reads what a model or adapter directory declares about text and images.

    Args:
        path: the directory, of any layout, or a model's name.
        template: a template's name or file to write conversations with; None for the checkpoint's own.

    Raises:
        MissingFileError: the directory, its tokenizer or its base does not exist.
        UserError: the layout is not known, or a file cannot be understood.
    """
    processor = _open_ours(Path(path)) or _open_any(path)
    if template is None:
        return processor
    return replace(processor, template=resolve_template(template, processor.template))


def named_template(name: str, model: str) -> Template:
    """The template that `--conv-mode` names; for a model that XTuner made, XTuner's template of that name.

    Raises:
        UserError: no template has this name.
    """
    own = None
    if name in XTUNER_TEMPLATES:  # XTuner uses some names for other texts
        with contextlib.suppress(UserError):  # what is wrong with the model is reported when it is loaded
            own = open_processor(model).template
    return choose_template(name, own)


def processor_of_run(config: RunConfig, model: str | None = None, template: str | None = None) -> LlavaProcessor:
    """The processor of a run: the checkpoint's, with the changes that the run's JSON makes.

    Args:
        model: another checkpoint in place of the JSON's, a model or an adapter.
        template: another template in place of the JSON's.

    Raises:
        MissingFileError, UserError: see `open_processor`; or the run would refuse a key.
    """
    if template is not None:
        config = replace(config, chat_template=template)
    if model is not None:
        return run_processor(_open_for_run(model, config), config)
    quick = _without_paddle(config)
    if quick is not None:
        return quick
    from paddlemix.trainer.run_model import declared_processor

    return declared_processor(config)


def _open_for_run(model: str, config: RunConfig) -> LlavaProcessor:
    """The processor of a model in place of the run's own; a text-only one gets the run's tower."""
    if config.mm_vision_tower is None:
        return open_processor(model)
    from paddlemix.checkpoints.hub.resolve import resolve_model
    from paddlemix.checkpoints.layouts.recognise import is_adapter
    from paddlemix.trainer.run_model import base_spec

    if is_adapter(resolve_model(model)):  # it names its own base and tower
        return open_processor(model)
    return _declared(replace(base_spec(config), model=model))


def _without_paddle(config: RunConfig) -> LlavaProcessor | None:
    """The run's processor if model and adapter have our own layout and the model needs no other directory."""
    directory = Path(str(config.model_name_or_path))
    processor = _open_ours(directory)
    if processor is None:
        return None
    sight = _sight(directory)
    if config.mm_vision_tower is not None and (sight is None or sight.image_size is None):
        return None  # the tower has to be attached
    if config.vision_image_size is not None and sight is not None:
        sight = replace(sight, image_size=config.vision_image_size)
    if config.lora_path:
        processor = _open_ours(Path(config.lora_path))
    return None if processor is None else run_processor(processor, config, sight)


def _sight(directory: Path) -> VisionSizes | None:
    """What the `config.json` of our own layout says about images; None if there is none."""
    path = directory / "config.json"
    if not path.is_file():
        return None
    sizes = take(read_object(path), _SIGHT_KEYS, str(path), tell=False)
    vision = take(sizes.get("vision_config", {}), _VISION_KEYS, f"{path}: vision_config", tell=False)
    return VisionSizes(image_size=vision.get("image_size"), image_newline=sizes.get("image_newline", False))


def _open_ours(directory: Path) -> LlavaProcessor | None:
    path = directory / PROCESSOR_FILE
    if not path.is_file():
        return None
    # llava-hf has a file of this name too, without our keys.
    values = without_null(read_object(path))
    return processor_from_dict(values, directory) if values.keys() >= _OURS else None


def _open_any(path: str) -> LlavaProcessor:
    from paddlemix.checkpoints.adapters.adapter import read_adapter
    from paddlemix.checkpoints.adapters.adapter_processor import adapter_processor
    from paddlemix.checkpoints.adapters.base_places import base_of
    from paddlemix.checkpoints.base_model import BaseSpec
    from paddlemix.checkpoints.hub.resolve import resolve_model
    from paddlemix.checkpoints.layouts.recognise import is_adapter

    directory = resolve_model(path)
    if not is_adapter(directory):
        return _declared(BaseSpec(model=str(directory)))
    adapter = read_adapter(directory)
    # An adapter may bring its own tokenizer and template; the rest is its base's.
    processor = adapter_processor(_declared(base_of(adapter)), adapter)
    assert processor is not None
    return processor


def _declared(spec: BaseSpec) -> LlavaProcessor:
    """The processor of a base, its tower attached, from declared files alone."""
    from paddlemix.checkpoints.hub.resolve import resolve_model
    from paddlemix.checkpoints.pretrained import load_processor
    from paddlemix.checkpoints.sizes import declared_base
    from paddlemix.checkpoints.source import Source

    directory = resolve_model(spec.model)
    tower = None if spec.tower is None else str(resolve_model(spec.tower))
    source = declared_base(replace(spec, model=str(directory), tower=tower))
    processor = load_processor(source, for_weights=False) if isinstance(source, Source) else None
    if processor is None:
        raise UserError(f"{directory} has no tokenizer files; copy tokenizer.model from the base model")
    return processor
