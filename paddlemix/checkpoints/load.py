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

from paddlemix.checkpoints.adapters.adapter import AdapterFiles, read_adapter
from paddlemix.checkpoints.adapters.adapter_fit import AdapterWeights, check_fit
from paddlemix.checkpoints.adapters.adapter_processor import adapter_processor
from paddlemix.checkpoints.adapters.base_check import check_base
from paddlemix.checkpoints.adapters.base_places import choose_place, possible_places
from paddlemix.checkpoints.adapters.image_padding import warn_of_padding
from paddlemix.checkpoints.adapters.unbuilt_layers import unbuilt_with_adapter
from paddlemix.checkpoints.hub.model_names import is_model_name
from paddlemix.checkpoints.hub.part_places import looked_at
from paddlemix.checkpoints.hub.resolve import resolve_model
from paddlemix.checkpoints.identity.weight_identity import WeightFiles
from paddlemix.checkpoints.layouts.recognise import is_adapter
from paddlemix.checkpoints.layouts.towers import TOWER_KINDS
from paddlemix.checkpoints.new_parts import lacks_projector, load_projector, start_new_parts
from paddlemix.checkpoints.pretrained import (
    Pretrained,
    build_model,
    fill_model,
    load_processor,
    read_carried,
)
from paddlemix.checkpoints.projector_file import NEW_PARTS as NEW_PARTS
from paddlemix.checkpoints.quantized import choose_quantization, read_quantization
from paddlemix.checkpoints.source import Source, open_source, with_image_size
from paddlemix.checkpoints.strict import check_vocabulary, check_weights
from paddlemix.device import return_freed_memory
from paddlemix.errors import MissingFileError, UserError
from paddlemix.log import logger
from paddlemix.models.configuration import LlavaConfig
from paddlemix.models.kernels.fused import KernelSizes, choose_kernels
from paddlemix.models.presets import parameter_shapes
from paddlemix.peft.lora import add_lora, linear_names

_FLAGS = "give its folder with --model-base (chat, predict) or --model_name_or_path (merge-lora), "


@dataclass(frozen=True, kw_only=True)
class BaseSpec:
    """What a model is put together from before training.

    Args:
        model: its directory or name.
        tower: directory or name of a vision tower, used where `model` has none.
        mm_projector_type, mm_vision_select_layer, mm_vision_select_feature: of the projector that is then new.
        image_newline: whether the new parts include the end-of-row vector (LLaVA-1.6).
        vision_image_size: pixels that the tower reads, whatever it was trained on; None as the directory has it.
        projector_file: file with projector weights to start from.
        inside: of an XTuner directory the model without the adapters that stand beside it.
        quantize: how the language model's linear layers are held, see `peft/codes.py`; None as the directory has them.
        starts_projector: whether a projector is what is trained: one that is wholly missing is then begun.
    """

    model: str
    tower: str | None = None
    mm_projector_type: str = "mlp2x_gelu"
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"
    image_newline: bool = False
    vision_image_size: int | None = None
    projector_file: str | None = None
    inside: bool = False
    quantize: str | None = None
    starts_projector: bool = False


def load_pretrained(
    path: str | Path, dtype: str = "float32", base: str | None = None, quantize: str | None = None
) -> Pretrained:
    """Loads a model directory of any layout, or an adapter directory together with its base.

    Args:
        path: the directory, or a name, see `hub.resolve_model`.
        dtype: "float32", "float16" or "bfloat16", of the weights in memory.
        base: an adapter's base model; None for the one that it names.
        quantize: "int8", "nf4", "bfloat16" or "float16": the language model's linear layers are held so, coded while
            they are read; None as the directory has them, or as an adapter was trained.

    Returns:
        The model in evaluation mode, its processor, and the adapter's settings where there is one.

    Raises:
        MissingFileError: a directory or file is missing.
        UserError: the layout is unknown, weights are missing, extra or misshapen, the base is not the adapter's, or the
            model is quantised in another way already.
    """
    directory = resolve_model(path)
    if not is_adapter(directory):
        if base is not None:
            raise UserError(
                f"{path} is a whole model, so the base '{base}' has no use; --model-base is for adapters: leave it out"
            )
        return _finished(load_base(BaseSpec(model=str(path), quantize=quantize), dtype), dtype)
    adapter = read_adapter(directory)
    spec = base_of(adapter, base)
    loaded = apply_adapter(load_base(replace(spec, quantize=quantize or spec.quantize), dtype), adapter)
    return _finished(loaded, dtype)


def _finished(loaded: Pretrained, dtype: str) -> Pretrained:
    """The model, after the choice of fused kernels for it where the current device has some; a warning where its files
    and its pictures differ."""
    if loaded.processor is not None and loaded.files is not None:
        warn_of_padding(loaded.files.source.directory, loaded.processor)
    device = paddle.get_device()
    lines = choose_kernels(None, device, dtype, KernelSizes.of(loaded.model.config.text))
    if device != "cpu":
        for line in lines:
            logger.info("%s", line)
    return loaded


def base_of(adapter: AdapterFiles, model: str | None = None) -> BaseSpec:
    """Where an adapter's base is now: beside it as when it was saved, or at the place it had then.

    Args:
        model: the base model's directory where the user says it; a tower and the rest are still the adapter's.

    Raises:
        MissingFileError: at neither place.
    """
    known = {item.name for item in fields(BaseSpec)}
    spec = BaseSpec(**{key: value for key, value in adapter.base.items() if key in known})
    found: dict[str, Any] = {}
    for key in ("model", "tower", "projector_file"):
        value = getattr(spec, key)
        if value is None:
            continue
        if key == "model" and model is not None:
            found |= {"model": model, "inside": False}
            continue
        if key == "tower" and adapter.foreign is not None and not _needs_tower(replace(spec, **found), adapter):
            found[key] = None
            continue
        candidates = possible_places(adapter, key, value)
        there = choose_place(adapter, key, candidates)
        if there is None and is_model_name(value):
            continue  # loading finds what it names
        if there is None:
            raise MissingFileError(
                f"the base {key} of the adapter {adapter.directory} was not found ({looked_at(candidates)}); put it "
                f"back, {_FLAGS if key == 'model' else ''}or set its new place in {adapter.place_of_base(key)}"
            )
        found[key] = str(there)
    return replace(spec, **found)


def _needs_tower(spec: BaseSpec, adapter: AdapterFiles) -> bool:
    """Whether a foreign adapter's base is a language model alone, which then needs the adapter's projector too."""
    if open_source(resolve_model(spec.model), spec.inside).config.vision is not None:
        return False
    if not any(name.startswith(NEW_PARTS) for name in adapter.tensors()):
        raise MissingFileError(
            f"the adapter {adapter.directory} has no projector weights and its base {spec.model} neither; LLaVA writes "
            "them to non_lora_trainables.bin when training ends, copy that file too"
        )
    return True


def base_reference(spec: BaseSpec, directory: Path) -> dict[str, Any]:
    """A base as an adapter remembers it: names, and places absolute and relative to the adapter.

    Args:
        directory: where the adapter will be, which is not where it is while it is written.
    """
    values: dict[str, Any] = asdict(spec)
    relative = {}
    for key in ("model", "tower", "projector_file"):
        if values[key] is not None and (os.path.exists(values[key]) or not is_model_name(values[key])):
            values[key] = os.path.abspath(values[key])
            relative[key] = os.path.relpath(os.path.realpath(values[key]), os.path.realpath(directory))
    return {**values, "relative": relative}


def apply_adapter(base: Pretrained, adapter: AdapterFiles) -> Pretrained:
    """Adds an adapter's layers and weights to its base, in place.

    Raises:
        UserError: the base is another model, or weights are missing, extra or misshapen.
    """
    check_base(base, adapter)
    loaded, names = adapter.tensors(), set(linear_names(base.model))
    unbuilt = {name for name in adapter.config.modules if name.startswith("vision_tower.layers.")} - names
    config = replace(adapter.config, modules=tuple(name for name in adapter.config.modules if name not in unbuilt))
    weights = AdapterWeights(adapter.directory, config, loaded, adapter.names)
    check_fit(base.model, weights, str(base.directory))
    add_lora(base.model, config, loaded.keys())
    may_miss = adapter.base_names(base.model)
    behind = fill_model(base.model, loaded, str(adapter.directory), may_miss=lambda name: name in may_miss)
    base.model.eval()
    processor = adapter_processor(base.processor, adapter)
    if processor is not None:
        check_vocabulary(processor.tokenizer.num_rows, base.model.config.text.vocab_size, str(adapter.directory))
    return replace(
        base,
        processor=processor,
        adapter=config,
        directory=adapter.directory,
        unused=unbuilt_with_adapter(base.unused, behind, adapter.config, unbuilt),
    )


def load_base(spec: BaseSpec, dtype: str = "float32") -> Pretrained:
    """Loads a model directory; a text-only one gets the tower of `spec` and a new projector.

    Raises:
        MissingFileError, UserError: see `load_pretrained`; also where `spec.tower` is no vision tower.
    """
    files = open_weights(spec)
    source, tower = files.source, files.tower
    if tower is not None:
        tower = with_image_size(tower, spec.vision_image_size)
        source = attach_tower(source, tower, spec)
    else:
        source = with_image_size(source, spec.vision_image_size)
    check_tower(source.config, spec)
    quantization = choose_quantization(source.directory, spec.quantize)
    if quantization is not None and quantization.kind == "nf4":  # who asks for so few bits is short of memory
        return_freed_memory()
    tensors = source.tensors() if tower is None else {**source.tensors(), **tower.tensors()}
    may_begin = spec.starts_projector or spec.projector_file is not None
    begins = tower is not None or (may_begin and lacks_projector(source, tensors))
    if begins and tower is None and spec.projector_file is None:
        kind = source.config.mm_projector_type
        logger.warning("%s declares a projector and has no weights of one; a new %s is begun", spec.model, kind)

    def may_miss(name: str) -> bool:
        return begins and name.startswith(NEW_PARTS)

    if read_quantization(source.directory) is None:  # sizes that are not the weights' cost no memory
        check_weights(parameter_shapes(source.config), tensors, spec.model, may_miss)
    model = build_model(source.config, dtype, quantization=quantization)
    unused = fill_model(model, tensors, spec.model, may_miss)
    if begins:
        start_new_parts(model, dtype)
    if spec.projector_file is not None:
        load_projector(model, Path(spec.projector_file))
    model.eval()
    carried = read_carried(source.directory)
    return Pretrained(
        model, load_processor(source), source.directory, unused, carried=carried, files=files, begun=begins
    )


def open_weights(spec: BaseSpec) -> WeightFiles:
    """Opens what a model is put together from: the model, a tower where it has none, a projector's own file.

    Raises:
        MissingFileError, UserError: see `load_base`.
    """
    source = open_source(spec.model, spec.inside)
    attached = source.config.vision is None and spec.tower is not None
    if not attached and spec.tower is not None:
        logger.warning("%s has its own vision tower; mm_vision_tower '%s' is not used", spec.model, spec.tower)
    tower = _open_tower(spec.tower) if attached and spec.tower else None
    return WeightFiles(source, tower, None if spec.projector_file is None else Path(spec.projector_file))


def check_tower(config: LlavaConfig, spec: BaseSpec) -> None:
    """Whether there is a tower for the projector that is trained.

    Args:
        config: of the model that `spec` leads to.

    Raises:
        UserError: there is none.
    """
    if spec.starts_projector and config.vision is None:
        raise UserError(
            f"mm_vision_tower is missing: {spec.model} is a language model alone, and its projector is to be trained; "
            "set mm_vision_tower to a directory or name, e.g. openai/clip-vit-large-patch14-336"
        )


def _open_tower(tower: str) -> Source:
    source = Source.open(resolve_model(tower))
    if source.kind not in TOWER_KINDS:
        raise UserError(f"mm_vision_tower '{tower}' is no vision tower (its layout is {source.kind})")
    return source


def attach_tower(text: Source, tower: Source, spec: BaseSpec) -> Source:
    """A text-only checkpoint with a tower's sizes and pixels; neither's weights are read."""
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
