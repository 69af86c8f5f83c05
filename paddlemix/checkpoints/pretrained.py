"""Directory <-> model and processor, whatever the layout; every weight accounted for.

    loaded = load_model("llava-v1.5-7b")
    save_model(loaded, "out")

Loading is strict (a missing, an extra and a misshapen weight are errors, listed together) and goes tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import paddle

from paddlemix.checkpoints.files import TensorEntry, array_entry, atomic_directory, write_json, write_weights
from paddlemix.checkpoints.layouts import ADAPTER_FILE, CONFIG_FILE, FORMAT_KEY, FORMAT_VERSION
from paddlemix.checkpoints.source import Source
from paddlemix.errors import UserError
from paddlemix.models.configuration import LlavaConfig
from paddlemix.models.layers import skip_initialisation
from paddlemix.models.llava import LlavaModel
from paddlemix.peft.lora import LoRAConfig
from paddlemix.processors.llava import PROCESSOR_FILE, LlavaProcessor, processor_from_dict

MAX_SHARD_BYTES = 5 * 1024**3
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_MAX_LISTED = 8
_TOWER_LAYERS = "vision_tower.layers."
# a text-only model has no images; these stand in until a tower brings its own
_NO_TOWER = {
    "image_size": 336,
    "patch_size": 14,
    "image_aspect_ratio": "pad",
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


@dataclass
class Pretrained:
    """A model with all that belongs to it.

    Args:
        model: its weights are loaded; in evaluation mode.
        processor: None where the directory has no tokenizer.
        directory: where it was read from.
        unused: tower weights behind the selected layer: not built, kept so that saving loses nothing.
        adapter: settings of the adapter that was added to it, if any.
    """

    model: LlavaModel
    processor: LlavaProcessor | None
    directory: Path
    unused: dict[str, TensorEntry] = field(default_factory=dict)
    adapter: LoRAConfig | None = None


def load_model(path: str | Path, dtype: str = "float32") -> Pretrained:
    """Loads a model directory of any layout.

    Args:
        path: the directory.
        dtype: "float32", "float16" or "bfloat16", of the weights in memory.

    Raises:
        MissingFileError: a directory or file is missing.
        UserError: the layout is unknown, or weights are missing, extra or of the wrong shape.
    """
    source = open_source(path)
    model = build_model(source.config, dtype)
    unused = fill_model(model, source.tensors(), str(path))
    model.eval()
    return Pretrained(model, load_processor(source), source.directory, unused)


def open_source(path: str | Path) -> Source:
    """Opens a model directory, with a plain word where it is an adapter or a tower."""
    directory = Path(path)
    if (directory / ADAPTER_FILE).is_file():
        raise UserError(f"{directory} is an adapter, expected a whole model; merge it first (paddlemix merge-lora)")
    source = Source.open(directory)
    if source.kind == "clip":
        raise UserError(f"{directory} is a CLIP tower, expected a language model; give it as mm_vision_tower")
    return source


def load_processor(source: Source) -> LlavaProcessor | None:
    """The processor of an opened checkpoint; None where it has no tokenizer files.

    Raises:
        UserError: a processor or tokenizer file cannot be understood.
    """
    if not any((source.directory / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        return None
    values = source.processor if source.config.vision is not None else {**_NO_TOWER, **source.processor}
    return processor_from_dict(values, source.directory)


def build_model(config: LlavaConfig, dtype: str = "float32", initialise: bool = False) -> LlavaModel:
    """A model of the given sizes; its weights are zeros unless `initialise`."""
    before = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype)
    try:
        if initialise:
            return LlavaModel(config)
        with skip_initialisation():
            return LlavaModel(config)
    finally:
        paddle.set_default_dtype(before)


def fill_model(
    model: paddle.nn.Layer,
    tensors: Mapping[str, TensorEntry],
    source: str,
    may_miss: Callable[[str], bool] = lambda name: False,
) -> dict[str, TensorEntry]:
    """Copies weights into a model, one at a time.

    Args:
        tensors: under our names.
        source: for messages.
        may_miss: whether a parameter may keep its start value, e.g. a new projector.

    Returns:
        Tower weights that belong to layers which are not built, in memory: their file may be replaced before they
        are written.

    Raises:
        UserError: lists every missing, extra and misshapen weight; the model is then not usable.
    """
    parameters = dict(model.named_parameters())
    unused = {name: entry for name, entry in tensors.items() if _behind_selection(name, parameters)}
    tied = {"lm_head.weight"} - parameters.keys()
    missing = sorted(name for name in parameters.keys() - tensors.keys() if not may_miss(name))
    extra = sorted(tensors.keys() - parameters.keys() - unused.keys() - tied)
    wrong = [
        f"{name} is {list(tensors[name].shape)}, expected {list(parameters[name].shape)}"
        for name in sorted(parameters.keys() & tensors.keys())
        if tuple(tensors[name].shape) != tuple(parameters[name].shape)
    ]
    kinds = {"missing": missing, "extra": extra, "misshapen": wrong}
    faults = [_list(kind, names) for kind, names in kinds.items() if names]
    if faults:
        raise UserError(f"the weights of {source} do not fit its config.json: {'; '.join(faults)}")
    for name, entry in tensors.items():  # in the order of the file
        if name in parameters:
            copy_into(parameters[name], entry)
    return {name: array_entry(np.array(entry.read()), entry.dtype) for name, entry in unused.items()}


def _behind_selection(name: str, parameters: Mapping[str, paddle.Tensor]) -> bool:
    """Whether a weight is of a tower layer that has no parameter in the model, or of the norm behind the last."""
    if name.startswith(_TOWER_LAYERS):
        layer = name[len(_TOWER_LAYERS) :].partition(".")[0]
        return layer.isdecimal() and not any(built.startswith(f"{_TOWER_LAYERS}{layer}.") for built in parameters)
    return name in ("vision_tower.post_layernorm.weight", "vision_tower.post_layernorm.bias")


def _list(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return f"{len(names)} {kind}: {', '.join(names[:_MAX_LISTED])}{more}"


def copy_into(parameter: paddle.Tensor, entry: TensorEntry) -> None:
    """Reads a weight and copies it into a parameter of the same shape, converted to the parameter's dtype."""
    loaded = paddle.to_tensor(np.ascontiguousarray(entry.read()), place=paddle.CPUPlace())
    parameter.set_value(loaded.astype(parameter.dtype).numpy())


def tensor_entry(tensor: paddle.Tensor) -> TensorEntry:
    """A tensor as it can be written; it is copied to the host when it is read."""
    dtype = _DTYPES[str(tensor.dtype).rsplit(".", 1)[-1]]
    return TensorEntry(dtype, tuple(tensor.shape), tensor.numpy)


def parameter_entries(model: paddle.nn.Layer, names: set[str] | None = None) -> dict[str, TensorEntry]:
    """The weights of a model, or those of `names`, as they can be written."""
    return {
        name: tensor_entry(parameter) for name, parameter in model.named_parameters() if names is None or name in names
    }


def save_model(
    loaded: Pretrained, directory: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES, keep: tuple[str, ...] = ()
) -> None:
    """Writes a self-contained model directory in our own layout; it appears whole or not at all.

    Args:
        loaded: the model, its processor and the tower weights that are not built.
        directory: replaced if it exists, but for the names in `keep`.
        max_shard_bytes: largest weight file, bytes.

    Raises:
        UserError: it cannot be written; what was there before is untouched.
    """
    with atomic_directory(Path(directory), keep) as temporary:
        write_model(loaded, temporary, max_shard_bytes)


def write_model(loaded: Pretrained, directory: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes a model's files into an existing directory."""
    write_json(directory / CONFIG_FILE, config_values(loaded.model.config))
    write_processor(loaded.processor, directory)
    tensors = {**parameter_entries(loaded.model), **loaded.unused}
    write_weights(directory, tensors, max_shard_bytes, {"format": "paddlemix"})


def config_values(config: LlavaConfig) -> dict[str, object]:
    """The content of our own `config.json`."""
    return {FORMAT_KEY: FORMAT_VERSION, "model_type": "paddlemix_llava", **config.to_dict()}


def write_processor(processor: LlavaProcessor | None, directory: Path) -> None:
    """Writes tokenizer files and `processor_config.json`; nothing where a model has no processor."""
    if processor is not None:
        processor.tokenizer.save(directory)
        write_json(directory / PROCESSOR_FILE, processor.to_dict())
