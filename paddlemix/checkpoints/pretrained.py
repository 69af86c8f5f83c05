"""Directory <-> model and processor, whatever the layout; every weight accounted for.

    model = build_model(config)
    fill_model(model, source.tensors(), "llava-v1.5-7b")
    save_model(Pretrained(model, load_processor(source), source.directory), "out")

Loading is strict (missing, extra and misshapen weights are errors, listed together) and proceeds tensor by tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from paddlemix.checkpoints.files.copying import copy_into, own_part, reader
from paddlemix.checkpoints.files.directories import atomic_directory
from paddlemix.checkpoints.files.finite import finite
from paddlemix.checkpoints.files.joint_writing import DirectoryFiles, write_files
from paddlemix.checkpoints.files.shards import MAX_SHARD_BYTES, shard_files
from paddlemix.checkpoints.files.tensors import (
    FLOAT_TYPES,
    TensorEntry,
    Tensors,
    array_entry,
)
from paddlemix.checkpoints.files.weight_files import INDEX_FILE, write_index, write_json
from paddlemix.checkpoints.identity.weight_identity import WeightFiles
from paddlemix.checkpoints.layouts.added_rows import HF_VOCABULARY_FILE
from paddlemix.checkpoints.layouts.config_readers import NO_TOWER
from paddlemix.checkpoints.layouts.file_names import CONFIG_FILE
from paddlemix.checkpoints.layouts.recognise import config_values
from paddlemix.checkpoints.projector_file import NEW_PARTS
from paddlemix.checkpoints.quantized import (
    quantization_values,
    stored_entries,
    unfilled_arrays,
    with_codes,
)
from paddlemix.checkpoints.source import Source
from paddlemix.checkpoints.weight_check import check_vocabulary, check_weights
from paddlemix.models.configuration import LlavaConfig
from paddlemix.models.layers import skip_initialisation
from paddlemix.models.llava import LlavaModel
from paddlemix.parallel.deferred import defer, has_memory, is_large
from paddlemix.parallel.layout import ALONE, Layout
from paddlemix.parallel.tensor.model import SplitLlavaModel
from paddlemix.parallel.tensor.parts import part_of, whole_shape
from paddlemix.parallel.whole import WholeTensor, whole_weight
from paddlemix.peft.lora import LoRAConfig
from paddlemix.peft.quantize import QuantizationConfig, prepare_quantized
from paddlemix.processors.llava import PROCESSOR_FILE, LlavaProcessor, processor_from_dict
from paddlemix.processors.text.tokenizer import has_tokenizer


@dataclass
class Pretrained:
    """A model with all that belongs to it.

    Args:
        model: its weights are loaded; in evaluation mode.
        processor: None if the directory has no tokenizer.
        directory: where it was read from.
        unused: tower weights after the selected layer: not built, kept so that saving loses nothing.
        adapter: settings of the adapter that was added to it, if any.
        carried: files that are saved with the weights unchanged, name -> content; see `added_rows`.
        files: what the weights were read from, without the adapter's; None for a model from no file.
        begun: whether projector and newline vector are in none of these files: they are new, or have their own file.
    """

    model: LlavaModel
    processor: LlavaProcessor | None
    directory: Path
    unused: dict[str, TensorEntry] = field(default_factory=dict)
    adapter: LoRAConfig | None = None
    carried: dict[str, bytes] = field(default_factory=dict)
    files: WeightFiles | None = None
    begun: bool = False

    @property
    def declared_directories(self) -> tuple[Path, Path]:
        """Where the model's own declared files are, and those of its tower: usually the same."""
        if self.files is None:
            return self.directory, self.directory
        source, tower = self.files.source, self.files.tower
        if tower is not None:
            return source.directory, tower.directory
        return source.directory, source.tower_directory or source.directory


def read_carried(directory: Path) -> dict[str, bytes]:
    """The files of a model directory that are saved with its weights unchanged."""
    path = directory / HF_VOCABULARY_FILE
    return {HF_VOCABULARY_FILE: path.read_bytes()} if path.is_file() else {}


def load_processor(source: Source, for_weights: bool = True) -> LlavaProcessor | None:
    """The processor of an opened checkpoint; None if it has no tokenizer files.

    Args:
        for_weights: whether its tokens must have rows in the model's embedding.

    Raises:
        UserError: a processor or tokenizer file cannot be understood, or the tokenizer has more ids than the model.
    """
    if not has_tokenizer(source.directory):
        return None
    # a text-only model has a processor all the same, for its template and tokenizer
    values = source.processor if source.config.vision is not None else {**NO_TOWER, **source.processor}
    processor = processor_from_dict(values, source.directory)
    if for_weights:
        check_vocabulary(processor.tokenizer.num_rows, source.config.text.vocab_size, str(source.directory))
    return processor


def build_model(
    config: LlavaConfig,
    dtype: str = "float32",
    initialise: bool = False,
    quantization: QuantizationConfig | None = None,
    defers: bool = False,
    layout: Layout = ALONE,
) -> LlavaModel:
    """A model of the given sizes; its weights are zeros unless `initialise`.

    Args:
        defers: large weights have no memory yet, see `parallel.deferred`.
        quantization: how the language model's linear layers are stored; they begin without codes, and their float
            weights are never allocated.
        layout: with a tensor group the model is this process's part of it.

    Raises:
        UserError: a pattern of `quantization.skip` matches nothing, or the heads cannot be split over the group.
    """
    before = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype)
    try:
        if initialise:
            assert layout.tensor_degree == 1, "parts of new weights would be drawn by each process for itself"
            return LlavaModel(config)
        # Lazy where quantised: 7B in float32 would be allocated only to be replaced by codes.
        is_lazy = quantization is not None or defers
        with skip_initialisation(), paddle.LazyGuard() if is_lazy else contextlib.nullcontext():
            model = LlavaModel(config) if layout.tensor_degree == 1 else SplitLlavaModel(config, layout)
        if quantization is not None:
            prepare_quantized(model, quantization)
        for name, parameter in model.named_parameters() if is_lazy else ():
            if not (defers and _may_be_deferred(name, parameter)):
                parameter.initialize()
        return model
    finally:
        paddle.set_default_dtype(before)


def _may_be_deferred(name: str, parameter: paddle.Tensor) -> bool:
    # New parts are drawn or read from a file of their own, and an adapter's base is known by its embedding.
    return is_large(parameter) and not name.startswith((*NEW_PARTS, "language_model.embed_tokens"))


def fill_model(
    model: paddle.nn.Layer,
    tensors: Mapping[str, TensorEntry],
    source: str,
    may_miss: Callable[[str], bool] = lambda name: False,
) -> dict[str, TensorEntry]:
    """Copies weights into a model, one at a time; those of quantised layers without codes are quantised on the way.

    A weight that has no memory is read later, see `parallel.deferred`.

    Args:
        tensors: under our names.
        source: for messages.
        may_miss: whether a parameter may keep its initial value, e.g. a new projector's.

    Returns:
        Tower weights that belong to layers which are not built, in memory: their file may be replaced before they
        are written.

    Raises:
        UserError: lists every missing, extra and misshapen weight; or a weight holds NaN or infinity.  The model is
            then not usable.
    """
    # what the model calls for: its parameters, and the codes of quantised layers, which are buffers
    parameters, codes = dict(model.named_parameters()), unfilled_arrays(model)
    expected = {name: whole_shape(parameter) for name, parameter in parameters.items()}
    expected |= {name: layer.arrays[part].whole for name, (layer, part) in codes.items()}
    as_stored = tensors
    tensors = {name: finite(entry, f"'{name}' of {source}") for name, entry in tensors.items()}
    tensors = with_codes(tensors, model, source)
    unused = check_weights(expected, tensors, source, may_miss)
    for name, entry in tensors.items():  # in the order of the file, which a disk reads fastest
        if name in parameters and not has_memory(parameters[name]):
            defer(parameters[name], reader(as_stored[name], f"'{name}' of {source}"))
        elif name in parameters:  # else an array of codes, or a weight that is not built
            # Looked at as it is read, so that of a weight that processes split nothing else is.
            own = own_part(as_stored[name], part_of(parameters[name]))
            copy_into(parameters[name], finite(own, f"'{name}' of {source}"))
        elif name in codes:
            layer, part = codes[name]
            layer.store(part, entry.read())
    return {name: array_entry(np.array(entry.read()), entry.dtype) for name, entry in tensors.items() if name in unused}


def tensor_entry(tensor: paddle.Tensor) -> TensorEntry:
    """A tensor as it can be written; copied to the host when it is read."""
    dtype = FLOAT_TYPES[str(tensor.dtype).rsplit(".", 1)[-1]]
    return TensorEntry(dtype, tuple(tensor.shape), tensor.numpy)


def parameter_entries(
    model: paddle.nn.Layer, names: set[str] | None = None, layout: Layout = ALONE
) -> dict[str, TensorEntry]:
    """The weights of a model, or those of `names`, as they can be written: whole, whatever processes hold of them."""
    return {
        name: whole_entry(whole_weight(parameter, layout))
        for name, parameter in model.named_parameters()
        if names is None or name in names
    }


def whole_entry(tensor: WholeTensor) -> TensorEntry:
    """A tensor that processes may hold shares of, as it can be written by one of them."""
    share = tensor.take_part if tensor.is_shared else None
    return TensorEntry(FLOAT_TYPES[tensor.dtype], tensor.shape, tensor.read, share=share)


def save_model(loaded: Pretrained, directory: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes a self-contained model directory in our own layout; it appears whole or not at all.

    Args:
        loaded: the model, its processor and the tower weights that are not built.
        directory: replaced whole if it exists.
        max_shard_bytes: largest weight file, bytes.

    Raises:
        UserError: it cannot be written; what was there before is untouched.
    """
    with atomic_directory(Path(directory)) as temporary:
        write_files(temporary, model_files(loaded, max_shard_bytes=max_shard_bytes))


def model_files(loaded: Pretrained, layout: Layout = ALONE, max_shard_bytes: int = MAX_SHARD_BYTES) -> DirectoryFiles:
    """A model's files, to be written by the processes of a run."""
    weights = parameter_entries(loaded.model, layout=layout)
    tensors = {**weights, **stored_entries(loaded.model, layout), **loaded.unused}
    return files_of(loaded, tensors, quantization_values(loaded.model), max_shard_bytes)


def files_of(
    loaded: Pretrained, tensors: Tensors, values: Mapping[str, Any], max_shard_bytes: int = MAX_SHARD_BYTES
) -> DirectoryFiles:
    """The files of a model with these weights.

    Args:
        values: further keys of config.json.
    """
    weights = shard_files("model", tensors, max_shard_bytes, {"format": "paddlemix"})

    def write_others(directory: Path) -> None:
        write_json(directory / CONFIG_FILE, {**config_values(loaded.model.config), **values})
        write_processor(loaded.processor, directory)
        for name, content in loaded.carried.items():
            (directory / name).write_bytes(content)
        write_index(directory / INDEX_FILE, weights)

    return DirectoryFiles(weights, [write_others])


def write_processor(processor: LlavaProcessor | None, directory: Path) -> None:
    """Writes tokenizer files and `processor_config.json`; nothing if a model has no processor."""
    if processor is not None:
        processor.tokenizer.save(directory)
        write_json(directory / PROCESSOR_FILE, processor.to_dict())
