"""One entry for every directory: a whole model, an adapter with its base, or a text-only model that gets a tower.

loaded = load_pretrained("runs/demo/digits")
base = load_base(BaseSpec(model="vicuna-7b-v1.5", tower="clip-vit-large-patch14-336"))
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import paddle

from paddlemix.checkpoints.adapters.adapter import AdapterFiles, read_adapter
from paddlemix.checkpoints.adapters.adapter_fit import AdapterWeights, check_fit
from paddlemix.checkpoints.adapters.adapter_processor import adapter_processor
from paddlemix.checkpoints.adapters.base_check import check_base
from paddlemix.checkpoints.adapters.base_places import base_of
from paddlemix.checkpoints.adapters.image_padding import warn_of_padding
from paddlemix.checkpoints.adapters.unbuilt_layers import unbuilt_with_adapter
from paddlemix.checkpoints.base_model import BaseSpec, attach_tower, check_tower, open_weights
from paddlemix.checkpoints.hub.resolve import resolve_model
from paddlemix.checkpoints.layouts.recognise import is_adapter
from paddlemix.checkpoints.new_projector import initialise_new_parts, lacks_projector, load_projector
from paddlemix.checkpoints.pretrained import (
    Pretrained,
    build_model,
    fill_model,
    load_processor,
    read_carried,
)
from paddlemix.checkpoints.projector_file import NEW_PARTS
from paddlemix.checkpoints.quantized import choose_quantization, read_quantization
from paddlemix.checkpoints.source import with_image_size
from paddlemix.checkpoints.weight_check import check_vocabulary, check_weights
from paddlemix.device import return_freed_memory
from paddlemix.errors import UserError
from paddlemix.log import logger
from paddlemix.models.kernels.fused import KernelSizes, choose_kernels
from paddlemix.models.presets import parameter_shapes
from paddlemix.parallel.layout import ALONE, Layout
from paddlemix.peft.lora import add_lora, linear_names


def load_pretrained(
    path: str | Path,
    dtype: str = "float32",
    base: str | None = None,
    quantize: str | None = None,
    layout: Layout = ALONE,
) -> Pretrained:
    """Loads a model directory of any layout, or an adapter directory together with its base.

    Args:
        path: the directory, or a name, see `hub.resolve.resolve_model`.
        dtype: "float32", "float16" or "bfloat16", of the weights in memory.
        base: an adapter's base model; None for the one that it names.
        quantize: "int8", "nf4", "bfloat16" or "float16": how the language model's linear layers are stored, quantised
            while they are read; None: as in the directory, or as an adapter was trained.
        layout: with a tensor group this process reads its part of the model.

    Returns:
        The model in evaluation mode, its processor, and the adapter's settings if it has one.

    Raises:
        MissingFileError: a directory or file is missing.
        UserError: the layout is unknown, weights are missing, extra or misshapen, the base is not the adapter's, or the
            model is quantised in another way already.
    """
    # | path is        | base            | what is loaded                                   |
    # |----------------|-----------------|--------------------------------------------------|
    # | a whole model  | None            | it                                               |
    # | a whole model  | given           | an error: only adapters have a base              |
    # | an adapter     | None            | the base that it names, with it                  |
    # | an adapter     | given           | that base, checked against the adapter, with it  |
    directory = resolve_model(path)
    if not is_adapter(directory):
        if base is not None:
            raise UserError(
                f"{path} is a whole model, so the base '{base}' has no use; --model-base is for adapters: leave it out"
            )
        return _finished(load_base(BaseSpec(model=str(path), quantize=quantize), dtype, layout=layout), dtype)
    adapter = read_adapter(directory)
    spec = base_of(adapter, base)
    base_model = load_base(replace(spec, quantize=quantize or spec.quantize), dtype, layout=layout)
    return _finished(apply_adapter(base_model, adapter), dtype)


def _finished(loaded: Pretrained, dtype: str) -> Pretrained:
    """The model, after the choice of fused kernels for the device; warns if its files declare other padding."""
    if loaded.processor is not None and loaded.files is not None:
        warn_of_padding(loaded.files.source.directory, loaded.processor)
    device = paddle.get_device()
    lines = choose_kernels(None, device, dtype, KernelSizes.of(loaded.model.config.text))
    if device != "cpu":
        for line in lines:
            logger.info("%s", line)
    return loaded


def apply_adapter(base: Pretrained, adapter: AdapterFiles) -> Pretrained:
    """Adds an adapter's layers and weights to its base, in place.

    Raises:
        UserError: the base is another model, or weights are missing, extra or misshapen.
    """
    check_base(base, adapter)
    # Tower layers after the selected one are not built.  An adapter of another program may adapt them all the same:
    # what it says about them is kept for saving (`unbuilt_layers`), the rest is added as usual.
    loaded, names = adapter.tensors(), set(linear_names(base.model))
    unbuilt = {name for name in adapter.config.modules if name.startswith("vision_tower.layers.")} - names
    config = replace(adapter.config, modules=tuple(name for name in adapter.config.modules if name not in unbuilt))
    weights = AdapterWeights(adapter.directory, config, loaded, adapter.names)
    # before anything changes: the layers and sizes in the adapter's own names
    check_fit(base.model, weights, str(base.directory))
    add_lora(base.model, config, loaded.keys())
    may_miss = adapter.base_names(base.model)
    unused = fill_model(base.model, loaded, str(adapter.directory), may_miss=lambda name: name in may_miss)
    base.model.eval()
    processor = adapter_processor(base.processor, adapter)
    if processor is not None:
        check_vocabulary(processor.tokenizer.num_rows, base.model.config.text.vocab_size, str(adapter.directory))
    return replace(
        base,
        processor=processor,
        adapter=config,
        directory=adapter.directory,
        unused=unbuilt_with_adapter(base.unused, unused, adapter.config, unbuilt),
    )


def load_base(spec: BaseSpec, dtype: str = "float32", defers: bool = False, layout: Layout = ALONE) -> Pretrained:
    """Loads a model directory; a text-only one gets the tower of `spec` and a new projector.

    Args:
        defers: large weights are not read yet, see `parallel.deferred`.
        layout: with a tensor group this process reads its part of the model.

    Raises:
        MissingFileError, UserError: see `load_pretrained`; also if `spec.tower` is not a vision tower.
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
    if quantization is not None and quantization.kind == "nf4":  # whoever wants so few bits is short of memory
        return_freed_memory()
    tensors = source.tensors() if tower is None else {**source.tensors(), **tower.tensors()}
    may_begin = spec.starts_projector or spec.projector_file is not None
    # The projector is new if the tower is, or if it may be and the checkpoint declares one without weights.
    begins = tower is not None or (may_begin and lacks_projector(source, tensors))
    if begins and tower is None and spec.projector_file is None:
        kind = source.config.mm_projector_type
        logger.warning("%s declares a projector but has no weights for it; a new %s is initialised", spec.model, kind)

    def may_miss(name: str) -> bool:
        return begins and name.startswith(NEW_PARTS)

    if read_quantization(source.directory) is None:  # before memory is allocated for wrong sizes
        check_weights(parameter_shapes(source.config), tensors, spec.model, may_miss)
    model = build_model(source.config, dtype, quantization=quantization, defers=defers, layout=layout)
    unused = fill_model(model, tensors, spec.model, may_miss)
    if begins:
        initialise_new_parts(model, dtype)
    if spec.projector_file is not None:
        load_projector(model, Path(spec.projector_file))
    model.eval()
    carried = read_carried(source.directory)
    return Pretrained(
        model, load_processor(source), source.directory, unused, carried=carried, files=files, begun=begins
    )
