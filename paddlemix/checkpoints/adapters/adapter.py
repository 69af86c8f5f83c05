"""Adapter directories: LoRA weights, the other trained weights, tokenizer, processor and where the base is.

lora_config.json            settings, adapted layers, base, fingerprint of the base
adapter_model.safetensors   lora_A, lora_B, ... and every weight that was trained whole (e.g. the projector); its header
                            also has the digest of each of the base's weights, see `weight_identity`, and the values
                            of the base's config.json that the computation uses, see `declared_identity`
processor_config.json       with the tokenizer files: everything but the base's weights
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from paddlemix.checkpoints.adapters.foreign_adapter import read_foreign_adapter
from paddlemix.checkpoints.adapters.xtuner_adapter import read_xtuner_adapter
from paddlemix.checkpoints.files.joint_writing import DirectoryFiles
from paddlemix.checkpoints.files.shards import TensorFile
from paddlemix.checkpoints.files.tensors import TensorEntry, convert
from paddlemix.checkpoints.files.weight_files import (
    read_json,
    read_metadata,
    read_safetensors,
    write_json,
)
from paddlemix.checkpoints.layouts.config_keys import FORMAT_KEY, FORMAT_VERSION, PROCESSOR_KEYS
from paddlemix.checkpoints.layouts.file_names import ADAPTER_FILE, ADAPTER_WEIGHTS, CONFIG_FILE, PEFT_ADAPTER_FILE
from paddlemix.checkpoints.layouts.xtuner_layout import has_adapters
from paddlemix.checkpoints.pretrained import parameter_entries, write_processor
from paddlemix.declared import Keys, flag, integer, mapping_of, take, text
from paddlemix.errors import UserError
from paddlemix.parallel.layout import ALONE, Layout
from paddlemix.parallel.tensor.parts import whole_shape, whole_sides
from paddlemix.peft.lora import lora_parameters, quantized_layers
from paddlemix.peft.settings import LoRAConfig, is_adapter_weight, is_start_value, lora_config_from_dict
from paddlemix.processors.llava import PROCESSOR_FILE, LlavaProcessor

_DIGESTS_KEY, _VALUES_KEY = "base_digests", "base_config"
_SAMPLED_ROWS = 64
# The fields of `base_model.BaseSpec`, and the base's places relative to the adapter.
_BASE_KEYS = Keys(
    {
        **dict.fromkeys(("model", "tower", "projector_file", "mm_projector_type", "mm_vision_select_feature"), text),
        **dict.fromkeys(("image_newline", "inside", "starts_projector"), flag),
        "mm_vision_select_layer": integer(-1000, 1000),
        "vision_image_size": integer(1, 1 << 20),
        "quantize": text,
        "relative": mapping_of(text),
    }
)


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter directory, read except for its weights.

    Args:
        directory: where it is.
        config: rank, scaling and adapted layers.
        base: how to put the base together, see `base_model.BaseSpec`, and its places relative to the adapter.
        fingerprint: of the base's weights; "" for an adapter of another program, which has none.
        processor: content of its `processor_config.json`; for another program's, what its `config.json` declares.
        foreign: the weights of an adapter of another program; None for one of ours.
        names: our name of a foreign adapter's weight -> the name in its file.
    """

    directory: Path
    config: LoRAConfig
    base: dict[str, Any]
    fingerprint: str
    processor: dict[str, Any]
    foreign: dict[str, TensorEntry] | None = None
    names: Mapping[str, str] = field(default_factory=dict)

    def tensors(self) -> dict[str, TensorEntry]:
        """Its weights under our names, unread."""
        return read_safetensors(self.directory / ADAPTER_WEIGHTS) if self.foreign is None else self.foreign

    def base_digests(self) -> dict[str, str]:
        """Our name -> digest of each of its base's weights; {} for an adapter of an earlier version or another
        program, which has none.

        Raises:
            UserError: they cannot be understood.
        """
        return {name: str(digest) for name, digest in self._noted(_DIGESTS_KEY).items()}

    def base_values(self) -> dict[str, Any]:
        """Its base's `declared_identity.computed_values`; {} if it has none, as for `base_digests`.

        Raises:
            UserError: they cannot be understood.
        """
        return self._noted(_VALUES_KEY)

    def _noted(self, key: str) -> dict[str, Any]:
        if self.foreign is not None:
            return {}
        path = self.directory / ADAPTER_WEIGHTS
        try:
            return dict(json.loads(read_metadata(path).get(key, "{}")).items())
        except (ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"'{path}' has a damaged header ({key}: {error}); copy it again") from error

    def place_of_base(self, key: str) -> str:
        """Where this adapter declares its base, for messages.

        Args:
            key: "model", "tower" or "projector_file".
        """
        if self.foreign is None:
            return f"'base' of {self.directory / ADAPTER_FILE}"
        if key != "model":
            return f"mm_vision_tower of {self.directory / CONFIG_FILE}"
        own = [self.directory / name for name in (PEFT_ADAPTER_FILE, ADAPTER_FILE)]
        own += sorted(self.directory.glob(f"*/{PEFT_ADAPTER_FILE}"))  # XTuner's are in folders
        files = [str(path) for path in own if path.is_file()]
        return f"base_model_name_or_path of {files[0] if files else self.directory / CONFIG_FILE}"

    def base_names(self, model: paddle.nn.Layer) -> set[str]:
        """Names of a model's weights that come from the base: all but the adapter's own.

        Also PiSSA's start values, if another program trained it, which computes them from the base and saves none.
        """
        names = [name for name, _ in model.named_parameters()]
        computed = {name for name in names if is_start_value(name)} if self.foreign is not None else set()
        return {name for name in names if not is_adapter_weight(name)} | computed


def read_adapter(directory: Path) -> AdapterFiles:
    """Reads an adapter's settings: ours, PaddleMIX's, XTuner's or original LLaVA's (PEFT).

    Raises:
        MissingFileError: a file is missing.
        UserError: a setting is missing or not supported.
    """
    # | files                                           | adapter of                                    |
    # |-------------------------------------------------|-----------------------------------------------|
    # | projector/ and llm_adapter/, ...                | XTuner                                        |
    # | adapter_config.json                             | PEFT: TRL, LLaMA-Factory, original LLaVA, ... |
    # | lora_config.json without our format's key       | PaddleMIX                                     |
    # | lora_config.json with it                        | this project                                  |
    xtuner = has_adapters(directory)
    peft = (directory / PEFT_ADAPTER_FILE).is_file()
    values = {} if xtuner or peft else read_json(directory / ADAPTER_FILE)
    if FORMAT_KEY not in values:
        other = read_xtuner_adapter(directory) if xtuner else read_foreign_adapter(directory)
        return AdapterFiles(directory, other.config, other.base, "", other.processor, other.tensors, other.names)
    try:
        return AdapterFiles(
            directory,
            lora_config_from_dict(values),
            _base(values["base"], directory),
            text.read(values["base_fingerprint"]),
            take(read_json(directory / PROCESSOR_FILE), PROCESSOR_KEYS, str(directory / PROCESSOR_FILE)),
        )
    except KeyError as error:
        raise UserError(f"{directory / ADAPTER_FILE} has no key {error}") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{directory / ADAPTER_FILE}: base_fingerprint is not a text") from error


def _base(values: Any, directory: Path) -> dict[str, Any]:
    where = f"{directory / ADAPTER_FILE}: base"
    found = take(values, _BASE_KEYS, where)
    if "model" not in found:
        raise UserError(f"{where} names no model")
    return found


@dataclass(frozen=True)
class AdapterSettings:
    """What an adapter directory declares besides weights; see `AdapterFiles`.

    Args:
        carried: weights of an earlier adapter that this one continues; they are written whether they train or not.
        digests: of the base's weights, see `base_check.base_digests`.
        values: what the base's computation uses, see `declared_identity.computed_values`.
    """

    config: LoRAConfig
    base: dict[str, Any]
    fingerprint: str
    carried: frozenset[str] = frozenset()
    digests: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


def adapter_files(
    model: paddle.nn.Layer, processor: LlavaProcessor | None, settings: AdapterSettings, layout: Layout = ALONE
) -> DirectoryFiles:
    """An adapter's files, to be written by the processes of a run."""
    # PiSSA's start values never train and are written all the same: the adapter is the difference to them
    trained = {name for name, parameter in model.named_parameters() if not parameter.stop_gradient}
    written = trained | {name for name, _ in lora_parameters(model)} | settings.carried
    # In the header of the weights, not in a file beside them: a digest must not outlive the weights that it belongs to.
    noted = {_DIGESTS_KEY: settings.digests, _VALUES_KEY: settings.values}
    metadata = {"format": "paddlemix", **{key: json.dumps(dict(values)) for key, values in noted.items()}}
    weights = TensorFile(ADAPTER_WEIGHTS, parameter_entries(model, written, layout), metadata)

    def write_others(directory: Path) -> None:
        write_processor(processor, directory)
        values = {
            FORMAT_KEY: FORMAT_VERSION,
            **settings.config.to_dict(),
            "base_model_name_or_path": settings.base["model"],
            "base": settings.base,
            "base_fingerprint": settings.fingerprint,
        }
        write_json(directory / ADAPTER_FILE, values)

    return DirectoryFiles([weights], [write_others])


def fingerprint(model: paddle.nn.Layer, stored: Mapping[str, TensorEntry] | None = None) -> str:
    """A rough mark of a base model: a hash over names, shapes and samples of weights that an adapter does not change.
    For a base whose digests are unknown, or an adapter of an earlier version, see `base_check`.

    Norms and rows of the token embedding are sampled, rounded to bfloat16 so that the dtype they were loaded in does
    not matter; new or trained projectors do not count.  A quantised model has the mark of its origin.

    Args:
        stored: the weights as in their files, for a model that has not all of their numbers: float16 rounds some to
            zero that bfloat16 has, and a process of a tensor group has a part.
    """
    digest = hashlib.sha256()
    parameters = dict(model.named_parameters())
    for name, shape in sorted(weight_shapes(model).items()):
        if name.startswith(("projector.", "image_newline")):
            continue
        digest.update(f"{name}{shape}".encode())
        if name.startswith("language_model.") and (name.endswith("norm.weight") or "embed_tokens" in name):
            step = max(shape[0] // _SAMPLED_ROWS, 1)
            if stored is None:
                digest.update(parameters[name].detach()[::step].astype("bfloat16").numpy().tobytes())
            else:
                rows, dtype = np.asarray(stored[name].read())[::step], stored[name].dtype
                digest.update((rows if dtype == "BF16" else convert(rows, dtype, "BF16")).tobytes())
    return digest.hexdigest()


def weight_shapes(model: paddle.nn.Layer) -> dict[str, list[int]]:
    """Name -> shape of a model's own weights, without an adapter's: those of quantised layers as before quantising, and
    those that a tensor group splits as wholes."""
    found = dict(quantized_layers(model))
    inside = tuple(f"{name}." for name in found)
    shapes = {
        name: list(whole_shape(parameter))
        for name, parameter in model.named_parameters()
        if not (name.startswith(inside) or is_adapter_weight(name))
    }
    for name, layer in found.items():
        plain = name.removesuffix(".base")  # its name inside an adapted layer
        shapes[f"{plain}.weight"] = list(whole_sides(layer, layer.weight_shape))
        if layer.bias is not None:
            shapes[f"{plain}.bias"] = list(whole_shape(layer.bias))
    return shapes
