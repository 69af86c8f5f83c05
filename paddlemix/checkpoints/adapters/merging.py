"""An adapter folded into its base while the weights are written: layer by layer, without a second copy of the model.

For a quantised base these are the weights that its codes decode to, which the adapter was trained on; the result is a
plain model.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import paddle

from paddlemix.checkpoints.adapters.adapter import read_adapter
from paddlemix.checkpoints.files.directories import atomic_directory, remove_directory
from paddlemix.checkpoints.files.joint_writing import write_files
from paddlemix.checkpoints.files.tensors import FLOAT_TYPES, TensorEntry, converted
from paddlemix.checkpoints.files.weight_files import read_json, read_weights, write_json
from paddlemix.checkpoints.hub.resolve import resolve_model
from paddlemix.checkpoints.layouts.file_names import ADAPTER_FILE, ADAPTER_WEIGHTS
from paddlemix.checkpoints.layouts.xtuner_layout import is_xtuner
from paddlemix.checkpoints.pretrained import MAX_SHARD_BYTES, Pretrained, files_of, tensor_entry
from paddlemix.checkpoints.quantized import read_quantization
from paddlemix.errors import UserError
from paddlemix.peft.linear import LoRALinear
from paddlemix.peft.quantized_linear import QuantizedLinear
from paddlemix.processors.llava import PROCESSOR_FILE
from paddlemix.processors.text.tokenizer import TOKENIZER_FILES

KEPT_ADAPTER = "adapter"  # folder inside an adapter's own, where a merged model has taken its place

_HALF = {"F16": "float16", "BF16": "bfloat16"}


def exact_storage(model: str) -> str | None:
    """How the large layers of a model directory can be stored in half the memory without losing a bit.

    Returns:
        "float16" or "bfloat16" if they are stored so, see `BaseSpec.quantize`; None: as they are.

    Raises:
        MissingFileError, UserError: the directory cannot be read.
    """
    directory = resolve_model(model)
    if is_xtuner(directory) or read_quantization(directory) is not None:
        return None  # XTuner's parts may be of different types
    # matrices decide: norms are often stored in another type, and are never quantised
    types = {entry.dtype for entry in read_weights(directory).values() if len(entry.shape) == 2}
    return _HALF.get(types.pop()) if len(types) == 1 else None


def write_merged(loaded: Pretrained, directory: Path, dtype: str, max_shard_bytes: int = MAX_SHARD_BYTES) -> int:
    """Writes a model with an adapter as a plain model into an existing directory.

    Args:
        loaded: not changed.
        dtype: of the written weights: "float32", "float16" or "bfloat16".

    Returns:
        Number of adapted layers.

    Raises:
        UserError: a file cannot be written, or a weight is too large for float16.
    """
    folded = _folded_layers(loaded.model)
    inside = tuple(f"{name}." for name in folded)
    tensors = {
        name: tensor_entry(parameter)
        for name, parameter in loaded.model.named_parameters()
        if not name.startswith(inside)
    }
    for name, layer in folded.items():
        tensors[f"{name}.weight"] = _weight_entry(layer)
        if layer.bias is not None:
            tensors[f"{name}.bias"] = tensor_entry(layer.bias)
    tensors = {**tensors, **loaded.unused}
    kind = FLOAT_TYPES[dtype]
    written = {name: converted(entry, kind) for name, entry in tensors.items()}
    write_files(directory, files_of(loaded, written, {}, max_shard_bytes))
    return sum(isinstance(layer, LoRALinear) for layer in folded.values())


def _folded_layers(model: paddle.nn.Layer) -> dict[str, LoRALinear | QuantizedLinear]:
    """Name -> layer of the linear layers that are more than a weight; not those inside an adapted one."""
    found: dict[str, LoRALinear | QuantizedLinear] = {}
    for name, layer in model.named_sublayers():
        # an adapted quantised layer "x" has the quantised one inside as "x.base": the outer one is enough
        if isinstance(layer, (LoRALinear, QuantizedLinear)) and name.removesuffix(".base") not in found:
            found[name] = layer
    return found


def _weight_entry(layer: LoRALinear | QuantizedLinear) -> TensorEntry:
    """The weight of the plain linear layer with the same outputs, computed when it is read."""

    def read() -> np.ndarray:
        with paddle.no_grad():
            merged = layer.merged_weight() if isinstance(layer, LoRALinear) else layer.dequantized()
            return merged.numpy()

    if isinstance(layer, LoRALinear):
        return TensorEntry("F32", (layer.in_features, layer.out_features), read)
    return TensorEntry("F32", tuple(layer.weight_shape), read)


def check_can_be_kept(directory: Path) -> None:
    """Checks that a merged model may replace the adapter in a folder, see `keeping_adapter`.

    Raises:
        UserError: the adapter is of another program, or its new place is taken.
    """
    if read_adapter(directory).foreign is not None:
        raise UserError(
            f"lora_path '{directory}' is an adapter of another program, whose files would be mixed with the model's; "
            "set merge_model_path to a new folder"
        )
    if (directory / KEPT_ADAPTER).exists():
        raise UserError(
            f"'{directory / KEPT_ADAPTER}', where the adapter would move, exists; set merge_model_path to a new folder"
        )


@contextlib.contextmanager
def keeping_adapter(directory: Path) -> Iterator[None]:
    """While the block replaces an adapter by a model, the adapter is copied to a folder inside, whole and usable; its
    weights are removed from the old place when the block has succeeded.

    Raises:
        UserError: it cannot be written.
    """
    place = directory / KEPT_ADAPTER
    settings = read_json(directory / ADAPTER_FILE)
    relative = settings["base"].get("relative", {})
    # one folder deeper, so every relative place of the base changes
    moved = {
        key: os.path.relpath(os.path.realpath(directory / path), os.path.realpath(place))
        for key, path in relative.items()
    }
    settings["base"] = {**settings["base"], "relative": moved}
    # Order matters for a kill at any moment: the copy is complete before the model replaces anything, and the old
    # weights go last.  At each point the folder holds the adapter, the model, or both.
    with atomic_directory(place) as temporary:
        for name in (ADAPTER_WEIGHTS, PROCESSOR_FILE, *TOKENIZER_FILES):
            if (directory / name).is_file():
                shutil.copyfile(directory / name, temporary / name)
        write_json(temporary / ADAPTER_FILE, settings)
    try:
        yield
    except BaseException:
        if (directory / ADAPTER_FILE).is_file():  # the adapter is still where it was
            remove_directory(place)
        raise
    (directory / ADAPTER_WEIGHTS).unlink()
