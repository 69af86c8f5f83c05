"""Whether an adapter's weights fit a model, reported in the names and shapes of the adapter's own files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

from paddlemix.checkpoints.files.tensors import TensorEntry
from paddlemix.errors import UserError
from paddlemix.identity import listed
from paddlemix.parallel.tensor.parts import whole_shape, whole_sides
from paddlemix.peft.quantized_base import QuantizedBase
from paddlemix.peft.settings import MAGNITUDE, LoRAConfig, is_adapter_weight, is_start_value

_MAX_LISTED = 4
_VOCABULARY = ("language_model.embed_tokens.weight", "lm_head.weight")  # a row or column for each token
_PARTLY_BUILT = "vision_tower."  # the layers after the selected one, and the last norm, are not built


@dataclass(frozen=True)
class AdapterWeights:
    """What is to be added to a model.

    Args:
        directory: where it comes from.
        config: its settings; only layers that the model should have.
        tensors: its weights under our names.
        names: our name -> the name in its file; a name that is missing is ours.
    """

    directory: Path
    config: LoRAConfig
    tensors: Mapping[str, TensorEntry]
    names: Mapping[str, str]

    def file_name(self, name: str) -> str:
        """The name that the file has or would have for one of our weights."""
        # a missing lora_B has no name in the file, but its layer's lora_A does
        module, _, part = name.rpartition(".")
        known = self.names.get(f"{module}.lora_A")
        return self.names.get(name) or (known.replace("lora_A", part) if known else name)


def check_fit(model: nn.Layer, weights: AdapterWeights, base: str) -> None:
    """Checks that a model has every layer that an adapter changes, in its sizes.

    Args:
        model: without the adapter.
        base: what the model is called, for messages.

    Raises:
        UserError: lists the layers that it lacks, the weights that are missing and those of other sizes.
    """
    # three lists, because one cause shows in one of them: another model lacks layers, a broken copy lacks weights,
    # another size of the same model has all of them in other shapes
    linear = dict(_linear_shapes(model))
    absent = [f"{module}.lora_A" for module in weights.config.modules if module not in linear]
    missing, misshapen, has_grown = [], [], False
    expected = dict(_whole_shapes(model, weights, linear))
    for module in weights.config.modules:
        if module in linear:
            expected |= _own_shapes(module, linear[module], weights.config)
    for name, shape in expected.items():
        entry = weights.tensors.get(name)
        if entry is None:
            missing.append(name)
        elif shape is None:
            absent.append(name)
        elif tuple(entry.shape) != shape:
            # a matrix that was transposed on reading is shown as in its file: that is what the user can look up
            turned = entry.turned_from is not None
            found, wanted = (list(sides[::-1] if turned else sides) for sides in (entry.shape, shape))
            misshapen.append(f"'{weights.file_name(name)}' is {found}, its layer needs {wanted}")
            has_grown |= name in _VOCABULARY and max(entry.shape) > max(shape)
    faults = []
    if absent:
        names = listed([f"'{weights.file_name(name)}'" for name in sorted(absent)], _MAX_LISTED)
        faults.append(f"{len(absent)} of its weights are of layers that the base does not have: {names}")
    if missing:
        names = listed([f"'{weights.file_name(name)}'" for name in missing], _MAX_LISTED)
        faults.append(f"{len(missing)} missing: {names}")
    if misshapen:
        faults.append(listed(misshapen, _MAX_LISTED))
    if has_grown:
        faults.append(
            "its vocabulary has more rows than the base's: use the llava-hf model that it was trained on, or, if "
            "tokens were added during training, merge it into its base with the program that trained it"
        )
    if faults:
        raise UserError(
            f"the adapter {weights.directory} does not fit its base {base}: {'; '.join(faults)}. Is it the adapter of "
            "another model?"
        )


def _linear_shapes(model: nn.Layer) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name, (in, out)) of every linear layer as a whole, quantised ones included."""
    for name, layer in model.named_sublayers():
        if isinstance(layer, QuantizedBase):
            yield name, whole_sides(layer, layer.weight_shape)
        elif isinstance(layer, nn.Linear):
            yield name, whole_sides(layer, layer.weight.shape)


def _own_shapes(module: str, shape: tuple[int, int], config: LoRAConfig) -> dict[str, tuple[int, ...] | None]:
    rank = config.rank_of(module)
    own: dict[str, tuple[int, ...] | None] = {
        f"{module}.lora_A": (shape[0], rank),
        f"{module}.lora_B": (rank, shape[1]),
    }
    return {**own, f"{module}.{MAGNITUDE}": (shape[1],)} if config.use_dora else own


def _whole_shapes(
    model: nn.Layer, weights: AdapterWeights, linear: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[str, tuple[int, ...] | None]]:
    """(name, shape) of the weights that the adapter holds whole; the shape is None if the model has no such weight."""
    parameters: dict[str, paddle.Tensor] = dict(model.named_parameters())
    for name in weights.tensors:
        module = name.rpartition(".")[0]
        if is_adapter_weight(name):
            if is_start_value(name) or module in weights.config.modules or name.startswith(_PARTLY_BUILT):
                continue
            yield name, None
        elif name in parameters:
            yield name, whole_shape(parameters[name])
        elif module in linear and name.endswith(".weight"):  # stored as codes
            yield name, linear[module]
        elif not (name.startswith(_PARTLY_BUILT) or _is_tied_copy(name, weights.tensors)):
            yield name, None


def _is_tied_copy(name: str, tensors: Mapping[str, TensorEntry]) -> bool:
    """Whether a weight is the output layer of a tied model, which some programs save as a copy of the embedding."""
    embedding = tensors.get("language_model.embed_tokens.weight")
    if name != "lm_head.weight" or embedding is None or embedding.shape != tensors[name].shape[::-1]:
        return False
    return bool(np.array_equal(embedding.read(), tensors[name].read().T))
