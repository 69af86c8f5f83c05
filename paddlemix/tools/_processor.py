"""The processor of a checkpoint, without its weights: for the commands that look at data.

A directory that has our own `processor_config.json` is read without paddle; the other layouts need the package that
knows them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from paddlemix.config.schema import RunConfig
from paddlemix.errors import UserError
from paddlemix.processors.chat_template import resolve_template
from paddlemix.processors.llava import PROCESSOR_FILE, LlavaProcessor, image_spec_from_dict, processor_from_dict
from paddlemix.processors.tokenizer import has_tokenizer

_OURS = {"chat_template", "image_aspect_ratio", "image_size", "patch_size"}  # llava-hf's file of this name lacks them
_RUN_KEYS = ("image_aspect_ratio", "image_grid_pinpoints", "mm_patch_merge_type")


def open_processor(path: str, template: str | None = None, tower: str | None = None) -> LlavaProcessor:
    """Reads what a model or adapter directory declares about text and images.

    Args:
        path: the directory, of any layout, or a model's name.
        template: a template's name or file to write conversations with; None for the checkpoint's own.
        tower: directory or name of a vision tower, for a text-only model.

    Raises:
        MissingFileError: the directory, its tokenizer or its base is not there.
        UserError: the layout is not known, or a file cannot be understood.
    """
    processor = _open_ours(Path(path)) or _open_any(path, tower)
    return processor if template is None else replace(processor, template=resolve_template(template))


def processor_of_run(config: RunConfig, model: str | None = None, template: str | None = None) -> LlavaProcessor:
    """The processor that a run's JSON leads to: the checkpoint's, with what the JSON says otherwise.

    Args:
        model: another checkpoint in place of the JSON's.
        template: another template in place of the JSON's.

    Raises:
        MissingFileError, UserError: see `open_processor`.
    """
    path = model or config.lora_path or config.model_name_or_path
    processor = open_processor(str(path), template or config.chat_template, config.mm_vision_tower)
    changes = {key: getattr(config, key) for key in _RUN_KEYS if getattr(config, key) is not None}
    changes |= {} if config.vision_image_size is None else {"image_size": config.vision_image_size}
    return replace(processor, image_spec=image_spec_from_dict({**processor.to_dict(), **changes}))


def _open_ours(directory: Path) -> LlavaProcessor | None:
    from paddlemix.config.document import read_document

    path = directory / PROCESSOR_FILE
    if not path.is_file():
        return None
    values = read_document(path).values
    return processor_from_dict(values, directory) if values.keys() >= _OURS else None


def _open_any(path: str, tower: str | None) -> LlavaProcessor:
    from paddlemix.checkpoints.adapter import read_adapter
    from paddlemix.checkpoints.hub import resolve_model
    from paddlemix.checkpoints.layouts import NO_TOWER, is_adapter
    from paddlemix.checkpoints.load import base_of
    from paddlemix.checkpoints.source import Source, open_source

    directory = resolve_model(path)
    changes, inside = dict[str, Any](), False
    if is_adapter(directory):
        adapter = read_adapter(directory)
        base = base_of(adapter)
        path, inside, tower, changes = base.model, base.inside, base.tower, adapter.processor
    source = open_source(path, inside)
    values = source.processor
    if source.config.vision is None:
        of_tower = Source.open(resolve_model(tower)).processor if tower else NO_TOWER
        values = {**values, **of_tower, "image_aspect_ratio": "square" if tower else NO_TOWER["image_aspect_ratio"]}
    if not has_tokenizer(source.directory):
        raise UserError(f"{source.directory} has no tokenizer files; copy tokenizer.model from the base model")
    return processor_from_dict({**values, **changes}, source.directory)
