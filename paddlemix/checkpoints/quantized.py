"""Quantised checkpoints: what config.json declares, and weights that are quantised while they are read.

Our own layout with `quantization_config` in config.json; a quantised layer has the arrays of
`peft/quantized_weight.py` under its name in place of `weight`.  Formats and layers are in `peft/`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from paddle import nn

from paddlemix.checkpoints.files.tensors import NUMPY_TYPES, TensorEntry, Tensors
from paddlemix.checkpoints.files.weight_files import read_json
from paddlemix.checkpoints.layouts.file_names import CONFIG_FILE
from paddlemix.checkpoints.weight_check import check_weights
from paddlemix.errors import UserError
from paddlemix.parallel.collectives import gathered_bytes
from paddlemix.parallel.layout import ALONE, Layout
from paddlemix.parallel.tensor.split_plan import all_parts
from paddlemix.peft.quantize import QUANT_METHOD, QuantizationConfig, quantization_of, quantized_linears
from paddlemix.peft.quantized_linear import QuantizedLinear
from paddlemix.peft.quantized_weight import QuantizedWeight, quantize_weight

QUANTIZATION_KEY = "quantization_config"
_STORED_TYPES = {np.dtype(kind): name for name, kind in NUMPY_TYPES.items()}  # uint16 is bfloat16


def read_quantization(directory: Path) -> QuantizationConfig | None:
    """How a model directory declares that it is quantised; None if it does not.

    Raises:
        MissingFileError: no config.json.
        UserError: it was quantised by another program, or in a way that this version does not know.
    """
    declared = read_json(directory / CONFIG_FILE).get(QUANTIZATION_KEY)
    if declared is None:
        return None
    method = declared.get("quant_method") if isinstance(declared, dict) else declared
    if method != QUANT_METHOD:
        raise UserError(
            f"{directory} was quantised by '{method}', which cannot be read; quantise the model that it was made from "
            "(paddlemix quantize)"
        )
    try:
        return QuantizationConfig(kind=str(declared["kind"]), skip=tuple(declared.get("skip", ())))
    except (KeyError, TypeError) as error:
        raise UserError(f"{directory / CONFIG_FILE}: {QUANTIZATION_KEY} cannot be understood: {error!r}") from error


def choose_quantization(directory: Path, kind: str | None) -> QuantizationConfig | None:
    """How a model is to be stored in memory: as its directory declares, or as requested.

    Args:
        kind: one of `quantized_weight.KINDS`; None: as it is.

    Raises:
        UserError: unknown kind, or the directory is quantised in another way already.
    """
    declared = read_quantization(directory)
    asked = None if kind is None else QuantizationConfig(kind=kind)
    # a quantised model can be loaded as what it is, but not as something else: its codes are all that is left of it
    if declared is None or asked is None:
        return declared or asked
    if declared.kind != asked.kind:
        raise UserError(
            f"{directory} is quantised already ({declared.kind}), so it cannot become {asked.kind}; use the model "
            "that it was made from"
        )
    return declared


def quantization_values(model: nn.Layer) -> dict[str, Any]:
    """The keys that a quantised model adds to config.json; {} for any other."""
    config = quantization_of(model)
    return {} if config is None else {QUANTIZATION_KEY: config.to_dict()}


def stored_entries(model: nn.Layer, layout: Layout = ALONE) -> dict[str, TensorEntry]:
    """The codes of a model's quantised layers, as they can be written: whole, whatever processes hold of them."""
    entries = {}
    for name, layer in quantized_linears(model).items():
        for part, array in layer.arrays.items():
            # defaults, because a loop's variables would be those of its last round
            def read(layer: QuantizedLinear = layer, part: str = part) -> np.ndarray:
                return _whole_array(layer, part, layout)

            is_split = array.part(layer.tensor_part) is not None
            entries[f"{name}.{part}"] = TensorEntry(
                _STORED_TYPES[array.dtype], array.whole, read, share=read if is_split else None
            )
    return entries


def _whole_array(layer: QuantizedLinear, name: str, layout: Layout) -> np.ndarray:
    """One array of a layer, of which each process of the tensor group may have a part; all of them call it."""
    array, own = layer.arrays[name], layer.stored(name)
    if layer.tensor_part is None or array.part(layer.tensor_part) is None:
        return own
    parts = all_parts(layer.tensor_part, layout.tensor_degree)
    shapes = [array.shape(part) for part in parts]
    sizes = [math.prod(shape) * array.dtype.itemsize for shape in shapes]
    # As bytes: collectives have no type for some arrays, and need equal shapes.
    padded = np.zeros(max(sizes), np.uint8)
    padded[: own.nbytes] = own.reshape(-1).view(np.uint8)
    pieces = [
        held[:size].view(array.dtype).reshape(shape)
        for held, size, shape in zip(gathered_bytes(padded, layout.tensor_group), sizes, shapes, strict=True)
    ]
    return array.joined(pieces, axis=1 - layer.tensor_part.axis)


def unfilled_arrays(model: nn.Layer) -> dict[str, tuple[QuantizedLinear, str]]:
    """Full name -> (layer, array) of the codes that a prepared model still lacks."""
    waiting = {name: layer for name, layer in quantized_linears(model).items() if not layer.filled}
    return {f"{name}.{part}": (layer, part) for name, layer in waiting.items() for part in layer.arrays}


def with_codes(tensors: Tensors, model: nn.Layer, source: str) -> dict[str, TensorEntry]:
    """Tensors with codes in place of the weights that a prepared model stores quantised; computed when they are read.

    Args:
        tensors: under our names; those of a checkpoint that is already quantised pass through.
        source: for messages.

    Raises:
        UserError: weights are misshapen, or codes are of another type.
    """
    waiting = {f"{name}.weight": layer for name, layer in quantized_linears(model).items() if not layer.filled}
    # shapes first, under the names that the file has: the user knows weights, not arrays of codes
    floats = {name: layer.whole_shape for name, layer in waiting.items() if name in tensors}
    check_weights(floats, {name: tensors[name] for name in floats}, source)
    for name, (layer, part) in unfilled_arrays(model).items():
        expected = _STORED_TYPES[layer.arrays[part].dtype]
        if name in tensors and tensors[name].dtype != expected:
            raise UserError(
                f"'{name}' of {source} is {tensors[name].dtype}, but its config.json declares {layer.kind}, which has "
                f"{expected} there; copy the directory again"
            )
    result: dict[str, TensorEntry] = {}
    for name, entry in tensors.items():
        result |= _coded_entries(name, entry, waiting[name]) if name in floats else {name: entry}
    return result


def _coded_entries(name: str, entry: TensorEntry, layer: QuantizedLinear) -> Mapping[str, TensorEntry]:
    """One weight's arrays; the first that is read quantises it, and the result is released with the last.

    Whole also where a process keeps a part: the steps of nf4 and of outputs are of whole weights.
    """
    held: list[QuantizedWeight] = []
    left: set[str] = set()

    def read(part: str) -> np.ndarray:
        if not held:
            # a torch checkpoint stores it output-major, as codes are, so it need not be transposed
            array = entry.read() if entry.turned_from is None else entry.turned_from.read().T
            try:
                held.append(quantize_weight(array, layer.kind, layer.tensor_part))
            except UserError as error:
                raise UserError(f"'{name}' cannot be quantised: {error}") from error
            left.update(layer.arrays)
        array = held[0].arrays[part]
        left.discard(part)
        if not left:
            held.clear()
        return array

    return {
        f"{name.removesuffix('weight')}{part}": TensorEntry(
            _STORED_TYPES[array.dtype],
            array.whole,
            lambda part=part: read(part),  # type: ignore[misc]
        )
        for part, array in layer.arrays.items()
    }
