"""Projector and newline vector of a model that has none yet: initialised, or filled from a file of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import paddle

from paddlemix.checkpoints.files.copying import copy_into
from paddlemix.checkpoints.files.finite import finite
from paddlemix.checkpoints.files.tensors import TensorEntry
from paddlemix.checkpoints.projector_file import NEW_PARTS, read_projector_file
from paddlemix.checkpoints.source import Source
from paddlemix.errors import UserError
from paddlemix.models.layers import normal
from paddlemix.models.llava import LlavaModel, build_projector


def lacks_projector(source: Source, tensors: Mapping[str, TensorEntry]) -> bool:
    """Whether a model declares a projector but has no weight of it, so that a new one may be initialised.

    LLaVA and PaddleMIX pretrain from a language model whose config.json already has the projector's keys.  A projector
    of which a part is missing is damaged, and remains an error.
    """
    # "identity" is a projector without weights: nothing is missing then
    has_weights = source.config.mm_projector_type != "identity" or source.config.image_newline
    return source.config.vision is not None and has_weights and not any(map(_is_new_part, tensors))


def _is_new_part(name: str) -> bool:
    return name.startswith(NEW_PARTS)


def initialise_new_parts(model: LlavaModel, dtype: str) -> None:
    """Initialises the projector and the newline vector of a model that was filled without them."""
    config = model.config
    assert config.vision is not None
    before = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype)
    try:
        # The model was built without initialisation.  A projector of its own draws the same numbers from the same seed
        # whatever the rest of the model is.
        fresh = build_projector(config.mm_projector_type, config.vision.hidden_size, config.text.hidden_size)
        for target, start in zip(model.projector.parameters(), fresh.parameters(), strict=True):
            target.set_value(start)
        if config.image_newline:
            # Source: LLaVA-NeXT llava_arch.py, a normal vector with deviation 1 / sqrt(width)
            normal(config.text.hidden_size**-0.5)(model.image_newline)
    finally:
        paddle.set_default_dtype(before)


def load_projector(model: LlavaModel, path: Path) -> None:
    """Fills the projector from a file of its own; LLaVA writes no newline vector there, so a new one may keep its start
    values."""
    # the newline vector alone may be missing from the file; anything else is an error
    parameters = {name: value for name, value in model.named_parameters() if name.startswith(NEW_PARTS)}
    found = read_projector_file(path)
    wrong = [
        f"{name} is {_shape_of(found.get(name))} there, {_shape_of(parameters.get(name))} in the model"
        for name in sorted(parameters.keys() | found.keys())
        if _shape_of(found.get(name)) != _shape_of(parameters.get(name)) and (name in found or name != "image_newline")
    ]
    if wrong:
        raise UserError(f"pretrain_mm_mlp_adapter '{path}' does not fit the model's projector: {'; '.join(wrong)}")
    for name, entry in found.items():
        copy_into(parameters[name], finite(entry, f"'{name}' of {path}"))


def _shape_of(weight: Any) -> str:
    return "missing" if weight is None else " x ".join(map(str, weight.shape))
