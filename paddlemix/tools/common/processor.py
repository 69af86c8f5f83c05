"""The processor of a checkpoint or of a run, without weights: for the commands that look at data.

A directory that has our own `processor_config.json` is read without paddle; the other layouts need the package that
knows them.
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
from paddlemix.processors.run_processor import Sight, run_processor
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
        MissingFileError: the directory, its tokenizer or its base is not there.
        UserError: the layout is not known, or a file cannot be understood.
    """
    processor = _open_ours(Path(path)) or _open_any(path)
    if template is None:
        return processor
    return replace(processor, template=resolve_template(template, processor.template))


def named_template(name: str, model: str) -> Template:
    """The template that `--conv-mode` names for a model: one that XTuner made takes XTuner's template of the name.

    Raises:
        UserError: no template has this name.
    """
    own = None
    if name in XTUNER_TEMPLATES:  # another program may call another text so
        with contextlib.suppress(UserError):  # loading says what is wrong with the model
            own = open_processor(model).template
    return choose_template(name, own)


def processor_of_run(config: RunConfig, model: str | None = None, template: str | None = None) -> LlavaProcessor:
    """The processor that a run's JSON leads to: the checkpoint's, with what the JSON says otherwise.

    Args:
        model: another checkpoint in place of the JSON's.
        template: another template in place of the JSON's.

    Raises:
        MissingFileError, UserError: see `open_processor`; or the run would refuse a key.
    """
    if template is not None:
        config = replace(config, chat_template=template)
    if model is not None:
        return run_processor(open_processor(model), config)
    quick = _without_paddle(config)
    if quick is not None:
        return quick
    from paddlemix.trainer.run_model import declared_processor

    return declared_processor(config)


def _without_paddle(config: RunConfig) -> LlavaProcessor | None:
    """The run's processor where model and adapter are of our own layout and the model has what it needs itself."""
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


def _sight(directory: Path) -> Sight | None:
    """What the `config.json` of our own layout says of images; None where there is none."""
    path = directory / "config.json"
    if not path.is_file():
        return None
    sizes = take(read_object(path), _SIGHT_KEYS, str(path), tell=False)
    vision = take(sizes.get("vision_config", {}), _VISION_KEYS, f"{path}: vision_config", tell=False)
    return Sight(image_size=vision.get("image_size"), image_newline=sizes.get("image_newline", False))


def _open_ours(directory: Path) -> LlavaProcessor | None:
    path = directory / PROCESSOR_FILE
    if not path.is_file():
        return None
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
