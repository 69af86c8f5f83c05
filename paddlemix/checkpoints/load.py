"""One entry for every directory: a whole model, an adapter with its base, or a text-only model that gets a tower.

    loaded = load_pretrained("runs/demo/digits")
    base = load_base(BaseSpec(model="vicuna-7b-v1.5", tower="clip-vit-large-patch14-336"))
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import paddle

from paddlemix.checkpoints.adapter import AdapterFiles, fingerprint, read_adapter
from paddlemix.checkpoints.files import TensorEntry, read_safetensors
from paddlemix.checkpoints.keymap import ORIGINAL, OURS
from paddlemix.checkpoints.layouts import ADAPTER_FILE
from paddlemix.checkpoints.pretrained import (
    Pretrained,
    build_model,
    copy_into,
    fill_model,
    load_processor,
    open_source,
)
from paddlemix.checkpoints.source import Source, rename
from paddlemix.errors import MissingFileError, UserError
from paddlemix.log import logger
from paddlemix.models.layers import normal
from paddlemix.models.llava import LlavaModel
from paddlemix.models.projector import build_projector
from paddlemix.peft.lora import LoRAConfig, add_lora
from paddlemix.processors.llava import processor_from_dict

_NEW_PARTS = ("projector.", "image_newline")


@dataclass(frozen=True, kw_only=True)
class BaseSpec:
    """What a model is put together from before training.

    Args:
        model: its directory.
        tower: directory of a CLIP tower, used where `model` has none.
        mm_projector_type, mm_vision_select_layer, mm_vision_select_feature: of the projector that is then new.
        image_newline: whether the new parts include the end-of-row vector (LLaVA-1.6).
        projector_file: safetensors file with projector weights to start from.
    """

    model: str
    tower: str | None = None
    mm_projector_type: str = "mlp2x_gelu"
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"
    image_newline: bool = False
    projector_file: str | None = None


def load_pretrained(path: str | Path, dtype: str = "float32") -> Pretrained:
    """Loads a model directory of any layout, or an adapter directory together with its base.

    Args:
        path: the directory.
        dtype: "float32", "float16" or "bfloat16", of the weights in memory.

    Returns:
        The model in evaluation mode, its processor, and the adapter's settings where there is one.

    Raises:
        MissingFileError: a directory or file is missing.
        UserError: the layout is unknown, weights are missing, extra or misshapen, or the base is not the adapter's.
    """
    directory = Path(path)
    if not (directory / ADAPTER_FILE).is_file():
        return load_base(BaseSpec(model=str(path)), dtype)
    adapter = read_adapter(directory)
    return apply_adapter(load_base(base_of(adapter), dtype), adapter)


def base_of(adapter: AdapterFiles) -> BaseSpec:
    """Where an adapter's base is now: beside it as when it was saved, else at the place it had then.

    Raises:
        MissingFileError: at neither place.
    """
    known = {item.name for item in fields(BaseSpec)}
    spec = BaseSpec(**{key: value for key, value in adapter.base.items() if key in known})
    relative = adapter.base.get("relative", {})
    found = {}
    for key in ("model", "tower", "projector_file"):
        value = getattr(spec, key)
        if value is None:
            continue
        candidates = [adapter.directory / relative[key]] if key in relative else []
        candidates.append(Path(value))
        there = next((candidate for candidate in candidates if candidate.exists()), None)
        if there is None:
            looked = ", ".join(os.path.normpath(candidate) for candidate in candidates)
            raise MissingFileError(
                f"the base {key} of the adapter {adapter.directory} was not found (looked at {looked}); put it back, or "
                f"edit 'base' in {adapter.directory / ADAPTER_FILE}"
            )
        found[key] = str(there)
    return replace(spec, **found)


def base_reference(spec: BaseSpec, directory: Path) -> dict[str, Any]:
    """A base as an adapter in `directory` remembers it: absolute places, and the same relative to the adapter."""
    values: dict[str, Any] = asdict(spec)
    relative = {}
    for key in ("model", "tower", "projector_file"):
        if values[key] is not None:
            values[key] = os.path.abspath(values[key])
            relative[key] = os.path.relpath(values[key], os.path.abspath(directory))
    return {**values, "relative": relative}


def apply_adapter(base: Pretrained, adapter: AdapterFiles) -> Pretrained:
    """Adds an adapter's layers and weights to its base, in place.

    Raises:
        UserError: the base is another model, or weights are missing, extra or misshapen.
    """
    found = fingerprint(base.model)
    if found != adapter.fingerprint:
        raise UserError(
            f"the adapter {adapter.directory} was trained on another base than {base.directory} (its weights differ: "
            f"{found[:12]}, expected {adapter.fingerprint[:12]})"
        )
    add_lora(base.model, adapter.config)
    loaded = adapter.tensors()
    fill_model(base.model, loaded, str(adapter.directory), may_miss=lambda name: name in adapter.base_names(base.model))
    base.model.eval()
    processor = processor_from_dict(adapter.processor, adapter.directory)
    return replace(base, processor=processor, adapter=adapter.config, directory=adapter.directory)


def load_base(spec: BaseSpec, dtype: str = "float32") -> Pretrained:
    """Loads a model directory; a text-only one gets the tower of `spec` and a new projector.

    Raises:
        MissingFileError, UserError: see `load_pretrained`; also where `spec.tower` is no CLIP tower.
    """
    source = open_source(spec.model)
    attached = source.config.vision is None and spec.tower is not None
    if not attached and spec.tower is not None:
        logger.warning("%s has its own vision tower; mm_vision_tower '%s' is not used", spec.model, spec.tower)
    tower = _open_tower(spec.tower) if attached and spec.tower else None
    if tower is not None:
        source = _attach(source, tower, spec)
    model = build_model(source.config, dtype)
    tensors = source.tensors() if tower is None else {**source.tensors(), **tower.tensors()}
    unused = fill_model(model, tensors, spec.model, lambda name: tower is not None and name.startswith(_NEW_PARTS))
    if tower is not None:
        _start_new_parts(model, dtype)
    if spec.projector_file is not None:
        _load_projector(model, Path(spec.projector_file))
    model.eval()
    return Pretrained(model, load_processor(source), Path(spec.model), unused)


def _open_tower(tower: str) -> Source:
    source = Source.open(Path(tower))
    if source.kind != "clip":
        raise UserError(f"mm_vision_tower '{tower}' is no CLIP vision tower (its layout is {source.kind})")
    return source


def _attach(text: Source, tower: Source, spec: BaseSpec) -> Source:
    config = replace(
        text.config,
        vision=tower.config.vision,
        mm_projector_type=spec.mm_projector_type,
        mm_vision_select_layer=spec.mm_vision_select_layer,
        mm_vision_select_feature=spec.mm_vision_select_feature,
        image_newline=spec.image_newline,
    )
    processor = {
        **text.processor,
        **tower.processor,
        "image_aspect_ratio": "square",
        "mm_vision_select_feature": spec.mm_vision_select_feature,
    }
    return replace(text, config=config, processor=processor)


def _start_new_parts(model: LlavaModel, dtype: str) -> None:
    """Gives the projector and the newline vector of a model that was filled without them their start values."""
    config = model.config
    assert config.vision is not None
    before = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype)
    try:
        fresh = build_projector(config.mm_projector_type, config.vision.hidden_size, config.text.hidden_size)
        for target, start in zip(model.projector.parameters(), fresh.parameters(), strict=True):
            target.set_value(start)
        if config.image_newline:
            normal(config.text.hidden_size**-0.5)(model.image_newline)
    finally:
        paddle.set_default_dtype(before)


def _load_projector(model: LlavaModel, path: Path) -> None:
    """Fills the projector from a file that holds its weights under our names or original LLaVA's."""
    if path.suffix != ".safetensors":
        raise UserError(f"pretrain_mm_mlp_adapter '{path}' is not a .safetensors file; convert it first")
    parameters = {name: value for name, value in model.named_parameters() if name.startswith(_NEW_PARTS)}
    entries = rename(read_safetensors(path), (OURS, ORIGINAL), path)
    found: dict[str, TensorEntry] = {name: entry for name, entry in entries.items() if name.startswith(_NEW_PARTS)}
    wrong = sorted(
        name
        for name in parameters.keys() | found.keys()
        if name not in found or name not in parameters or list(found[name].shape) != parameters[name].shape
    )
    if wrong:
        raise UserError(f"pretrain_mm_mlp_adapter '{path}' does not fit the model's projector: {', '.join(wrong)}")
    for name, parameter in parameters.items():
        copy_into(parameter, found[name])


def new_adapter(model: LlavaModel, config: LoRAConfig) -> str:
    """Adds a fresh adapter to a model and gives the fingerprint of the base it stands on."""
    mark = fingerprint(model)
    add_lora(model, config)
    return mark
