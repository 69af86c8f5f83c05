"""Adapters that other programs trained: original LLaVA's (PEFT) and PaddleMIX's, under our names.

    adapter_config.json, adapter_model.{safetensors,bin}, non_lora_trainables.bin, config.json     original LLaVA
    lora_config.json, lora_model_state.pdparams                                                    PaddleMIX

Sources: peft's LoraConfig; haotian-liu/LLaVA llava/model/builder.py (commit c121f04); PaddleNLP's LoRAConfig.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paddlemix.checkpoints.files import read_json, read_weight_file
from paddlemix.checkpoints.keymap import ORIGINAL, PADDLEMIX, KeyMap
from paddlemix.checkpoints.layouts import ADAPTER_FILE, CONFIG_FILE, PEFT_ADAPTER_FILE, read_processor_values
from paddlemix.checkpoints.source import rename
from paddlemix.checkpoints.tensors import TensorEntry, transposed
from paddlemix.errors import MissingFileError, UserError
from paddlemix.peft.settings import MAGNITUDE, LoRAConfig

PEFT_WEIGHTS, PEFT_OTHER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin"), "non_lora_trainables.bin"
PADDLEMIX_WEIGHTS = "lora_model_state.pdparams"
_LORA = re.compile(r"(.+)\.(lora_[AB]|lora_magnitude_vector)(?:\.default)?(?:\.weight)?")
# settings that change the computation and that we do not have: key -> values that change nothing
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),  # a bias of lora_B
    # those that change the base's weights, but for PiSSA, which can be computed again
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva", "pissa"),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "enable_lora_list": (None, []),
    "lora_use_mixer": (False, None),
    "use_mora": (False, None),
    "loraga": (False, None),
    "do_qat": (False, None),
    "use_quick_lora": (False, None, True),  # another order of the same sums
}


@dataclass(frozen=True)
class ForeignAdapter:
    """An adapter of another program.

    Args:
        config: rank, scaling and adapted layers.
        base: "model", and what a text-only base gets besides: "tower", "mm_projector_type" and so on.
        processor: the processor values that its config.json declares.
        tensors: its weights under our names, unread.
    """

    config: LoRAConfig
    base: dict[str, Any]
    processor: dict[str, Any]
    tensors: dict[str, TensorEntry]


def read_foreign_adapter(directory: Path) -> ForeignAdapter:
    """Reads an adapter directory of original LLaVA or PaddleMIX.

    Raises:
        MissingFileError: a file is missing.
        UserError: a setting is not supported, or a weight is of no known layer.
    """
    if (directory / PEFT_ADAPTER_FILE).is_file():
        path, keymap, tensors = directory / PEFT_ADAPTER_FILE, ORIGINAL, _llava_tensors(directory)
    else:
        path, keymap, tensors = directory / ADAPTER_FILE, PADDLEMIX, read_weight_file(directory / PADDLEMIX_WEIGHTS)
    values = read_json(path)
    base = values.get("base_model_name_or_path")
    if not base:
        raise UserError(f"{path} names no base model; set base_model_name_or_path to its folder")
    named = under_our_names(tensors, keymap, directory)
    declared = _declared(directory)
    spec = {**declared, "model": base, "relative": {"model": base}}
    return ForeignAdapter(adapter_settings(values, named, keymap, path), spec, read_processor_values(directory), named)


def peft_tensors(directory: Path) -> dict[str, TensorEntry]:
    """The weights of a PEFT adapter under its own names.

    Raises:
        MissingFileError: there are none.
    """
    found = [directory / name for name in PEFT_WEIGHTS if (directory / name).is_file()]
    if not found:
        raise MissingFileError(f"no adapter weights in {directory}: expected {' or '.join(PEFT_WEIGHTS)}")
    return read_weight_file(found[0])


def _llava_tensors(directory: Path) -> dict[str, TensorEntry]:
    """The adapter's weights and the others that trained, under original LLaVA's names."""
    tensors = _without_wrappers(peft_tensors(directory))
    other = directory / PEFT_OTHER_WEIGHTS
    return {**tensors, **_without_wrappers(read_weight_file(other))} if other.is_file() else tensors


def _without_wrappers(tensors: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """PEFT's "base_model.model." taken off, as LLaVA's own loader does it."""
    plain = {key.removeprefix("base_model."): entry for key, entry in tensors.items()}
    wrapped = any(key.startswith("model.model.") for key in plain) or any(
        key.startswith("model.lm_head") for key in plain
    )
    return {key.removeprefix("model.") if wrapped else key: entry for key, entry in plain.items()}


def under_our_names(tensors: Mapping[str, TensorEntry], keymap: KeyMap, directory: Path) -> dict[str, TensorEntry]:
    """LoRA matrices as ours, A [in, r] and B [r, out], and the rest renamed as a checkpoint's weights are."""
    named: dict[str, TensorEntry] = {}
    whole = {}
    for key, entry in tensors.items():
        match = _LORA.fullmatch(key)
        if match is None:
            whole[key.replace(".base_layer.", ".")] = entry  # PEFT's name of a trained bias
            continue
        module, part = match.groups()
        try:
            name = keymap.to_ours(f"{module}.weight")
        except KeyError as error:
            raise UserError(f"{directory}: the adapter weight '{key}' is of no layer that a LLaVA model has") from error
        if name is not None:
            turned = keymap.transposed and part != MAGNITUDE
            named[f"{name.removesuffix('.weight')}.{part}"] = transposed(entry) if turned else entry
    return {**named, **rename(whole, (keymap,), directory)}


def adapter_settings(
    values: Mapping[str, Any], tensors: Mapping[str, TensorEntry], keymap: KeyMap, path: Path
) -> LoRAConfig:
    """Settings in our terms; what PEFT's patterns say is told per layer.

    Args:
        values: content of the adapter's settings file at `path`.
        tensors: the adapter's weights under our names.

    Raises:
        UserError: a setting is not supported, or the weights are not those of the settings.
    """
    wrong = [key for key, harmless in _UNSUPPORTED.items() if key in values and values[key] not in harmless]
    if wrong:
        raise UserError(f"{path}: {', '.join(f'{key}={values[key]!r}' for key in wrong)} is not supported")
    modules = tuple(name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A"))
    odd = sorted(name for name in modules if f"{name}.lora_B" not in tensors)
    if odd or not modules:
        raise UserError(f"{path.parent} has " + (f"no lora_B for '{odd[0]}'" if odd else "no LoRA weights"))
    theirs = {module: keymap.to_theirs(f"{module}.weight").removesuffix(".weight") for module in modules}
    is_paddlenlp_pissa = bool(values.get("pissa"))
    try:
        rank, alpha = int(values["r"]), float(values["lora_alpha"])
        if is_paddlenlp_pissa:
            alpha = float(rank)  # its scaling is then 1
        ranks = {module: _patterned(values.get("rank_pattern"), theirs[module], rank) for module in modules}
        alphas = {module: _patterned(values.get("alpha_pattern"), theirs[module], alpha) for module in modules}
        config = LoRAConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=float(values.get("lora_dropout") or 0),
            modules=modules,
            rslora=bool(values.get("use_rslora") or values.get("rslora")) and not is_paddlenlp_pissa,
            use_dora=bool(values.get("use_dora")),
            pissa=is_paddlenlp_pissa or values.get("init_lora_weights") == "pissa",
            bias=_bias(values),
            rank_pattern={module: int(value) for module, value in ranks.items() if value != rank},
            alpha_pattern={module: float(value) for module, value in alphas.items() if value != alpha},
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:
        raise UserError(f"{path} cannot be understood: {error!r}") from error
    for module in modules:
        if tensors[f"{module}.lora_A"].shape[1] != config.rank_of(module):
            found = f"of rank {tensors[f'{module}.lora_A'].shape[1]}, {path} says {config.rank_of(module)}"
            raise UserError(f"lora_A of '{theirs[module]}' is {found}; the two files are of different adapters")
    return config


def _patterned(pattern: Mapping[str, Any] | None, module: str, otherwise: float) -> float:
    """The value of the first pattern that fits the end of a layer's name, as PEFT looks it up."""
    fitting = (value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(fitting, otherwise)


def _bias(values: Mapping[str, Any]) -> str:
    """Which biases train, from PEFT's `bias` or PaddleNLP's `trainable_bias`."""
    said = values.get("bias") or values.get("trainable_bias") or "none"
    return "lora_only" if said == "lora" else said


def _declared(directory: Path) -> dict[str, Any]:
    """What the adapter's config.json says about the parts that a text-only base does not have."""
    path = directory / CONFIG_FILE
    config = read_json(path) if path.is_file() else {}
    if not config.get("mm_vision_tower"):
        return {}
    return {
        "tower": config["mm_vision_tower"],
        "mm_projector_type": config.get("mm_projector_type") or "linear",
        "mm_vision_select_layer": config.get("mm_vision_select_layer", -2),
        "mm_vision_select_feature": config.get("mm_vision_select_feature") or "patch",
        "image_newline": "unpad" in (config.get("mm_patch_merge_type") or "flat"),
    }
