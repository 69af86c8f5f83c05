"""adapter_config.json of PEFT and lora_config.json of PaddleNLP as our settings: every key read, inert or refused.

A key that is in none of the tables below is refused unless it is empty: a newer PEFT may mean anything by it.
Sources: peft 0.21.2 LoraConfig and tuners/lora/layer.py; PaddleNLP 3.0.0b4 peft/lora/lora_config.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paddlemix.checkpoints.keymap import KeyMap
from paddlemix.checkpoints.tensors import TensorEntry
from paddlemix.errors import UserError
from paddlemix.peft.settings import LoRAConfig

# what the settings are made of
_SCALES = {"r", "lora_alpha", "use_rslora", "rslora", "rank_pattern", "alpha_pattern"}
_READ = {"peft_type", "base_model_name_or_path", "use_dora", "pissa", "lora_dropout", "bias", "trainable_bias"}
# which layers are adapted or saved: the weights say it, and are held against modules_to_save
_LAYERS = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "trainable_modules"}
# how it was trained, started or stored: nothing that its outputs depend on
_ABOUT = {"task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "runtime_config", "dtype"}
_TRAINED = {"velora_config", "ensure_weight_tying", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "lora_plus_scale"}
_STARTED = {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}  # count as `init_lora_weights` says
_PARALLEL = {"megatron_config", "megatron_core", "tensor_parallel_degree", "head_dim"}
# PEFT switches fan_in_fan_out off for a plain linear layer, and a LLaVA model has no other
_WITHOUT_EFFECT = {"fan_in_fan_out", "qalora_group_size", "merge_weights", "scaling", "use_quick_lora"}
_INERT = _LAYERS | {"modules_to_save"} | _ABOUT | _TRAINED | _STARTED | _PARALLEL | _WITHOUT_EFFECT
# values of `init_lora_weights` that leave the base as it is, and PiSSA, whose change can be computed again
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica", "pissa")
# key -> what a value other than an empty one does to the outputs
_REFUSED = {
    "lora_bias": "a bias of lora_B",
    "layer_replication": "layers that are there several times",
    "target_parameters": "adapters of bare parameters",
    "trainable_token_indices": "single rows of the embedding",
    "alora_invocation_tokens": "an adapter that only acts behind some tokens",
    "arrow_config": "routing between several adapters",
    "kasa_config": "a base without its smallest singular values",
    "monteclora_config": "weights that are drawn at random",
    "use_qalora": "an adapter of pooled inputs",
    "use_bdlora": "block-diagonal matrices",
    "enable_lora_list": "adapters of parts of joined layers",
    "lora_use_mixer": "a third matrix between the two",
    "use_mora": "a square matrix in the place of the two",
    "loraga": "a base that was changed at the start",
    "do_qat": "quantisation while training",
}
_MERGE_THERE = "merge it into its base there (PEFT: merge_and_unload) and use the merged model"


def check_kind(values: Mapping[str, Any], path: Path) -> None:
    """Whether an adapter is a LoRA without anything that changes its outputs and that we do not have.

    Args:
        values: content of the settings file at `path`.

    Raises:
        UserError: names the kind, or every such key with its value.
    """
    kind = values.get("peft_type") or "LORA"
    if kind != "LORA":
        raise UserError(f"{path}: an adapter of kind '{kind}' (peft_type) is not supported, only LORA; {_MERGE_THERE}")
    start = values.get("init_lora_weights")
    faults, known = [], _READ | _SCALES | _INERT | _REFUSED.keys() | {"init_lora_weights"}
    if start not in _STARTS:
        faults.append(f"init_lora_weights={start!r} (a base that was changed at the start and is not stored)")
    for key, value in values.items():
        if key in _REFUSED and value:
            faults.append(f"{key}={value!r} ({_REFUSED[key]})")
        elif value and key not in known:
            faults.append(f"{key}={value!r} (unknown here; remove it if it changes no outputs)")
    if faults:
        raise UserError(f"{path}: {', '.join(faults)} is not supported; {_MERGE_THERE}")


def check_saved(values: Mapping[str, Any], keys: list[str], path: Path) -> None:
    """Whether the weights of every module that PEFT was to save beside LoRA's are there.

    Args:
        keys: names of all weights, as the adapter's files have them.

    Raises:
        UserError: names the modules without weights.
    """
    names = values.get("modules_to_save") or []
    lacking = [name for name in names if not any(f".{name}." in f".{key}" for key in keys)]
    if lacking:
        raise UserError(
            f"{path}: modules_to_save names {', '.join(map(str, lacking))}, but {path.parent} holds no weights of "
            "them; the adapter's files are not complete"
        )


def adapter_settings(
    values: Mapping[str, Any], tensors: Mapping[str, TensorEntry], keymap: KeyMap, path: Path
) -> LoRAConfig:
    """Settings in our terms; what PEFT's patterns say is told per layer.

    Args:
        values: content of the adapter's settings file at `path`.
        tensors: the adapter's weights under our names.
        keymap: the names that the file's patterns mean.

    Raises:
        UserError: a setting is not supported, or the weights are not those of the settings.
    """
    check_kind(values, path)
    modules = tuple(name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A"))
    theirs = {module: keymap.to_theirs(f"{module}.weight").removesuffix(".weight") for module in modules}
    odd = sorted(theirs[module] for module in modules if f"{module}.lora_B" not in tensors)
    if odd or not modules:
        raise UserError(f"{path.parent} has " + (f"no lora_B for '{odd[0]}'" if odd else "no LoRA weights"))
    try:
        config = _config(values, theirs)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:
        raise UserError(f"{path} cannot be understood: {error!r}") from error
    for module in modules:
        shape = tensors[f"{module}.lora_A"].shape
        if len(shape) != 2 or not all(shape):
            raise UserError(
                f"lora_A of '{theirs[module]}' in {path.parent} has the shape {list(shape)}: the adapter was saved "
                "from one part of a sharded model (DeepSpeed ZeRO-3, FSDP); save it again with all parts gathered"
            )
        if shape[1] != config.rank_of(module):
            found = f"of rank {shape[1]}, {path} says {config.rank_of(module)}"
            raise UserError(f"lora_A of '{theirs[module]}' is {found}; the two files are of different adapters")
    return config


def _config(values: Mapping[str, Any], theirs: Mapping[str, str]) -> LoRAConfig:
    """The settings of layers whose names are `theirs`, ours -> the file's."""
    is_paddlenlp_pissa = bool(values.get("pissa"))
    rank, alpha = int(values["r"]), float(values["lora_alpha"])
    if is_paddlenlp_pissa:
        alpha = float(rank)  # its scaling is then 1
    ranks = {module: _patterned(values.get("rank_pattern"), name, rank) for module, name in theirs.items()}
    alphas = {module: _patterned(values.get("alpha_pattern"), name, alpha) for module, name in theirs.items()}
    return LoRAConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=float(values.get("lora_dropout") or 0),
        modules=tuple(theirs),
        rslora=bool(values.get("use_rslora") or values.get("rslora")) and not is_paddlenlp_pissa,
        use_dora=bool(values.get("use_dora")),
        pissa=is_paddlenlp_pissa or values.get("init_lora_weights") == "pissa",
        bias=_bias(values),
        rank_pattern={module: int(value) for module, value in ranks.items() if value != rank},
        alpha_pattern={module: float(value) for module, value in alphas.items() if value != alpha},
    )


def _patterned(pattern: Mapping[str, Any] | None, module: str, otherwise: float) -> float:
    """The value of the first pattern that fits the end of a layer's name, as PEFT looks it up."""
    fitting = (value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(fitting, otherwise)


def _bias(values: Mapping[str, Any]) -> str:
    """Which biases train, from PEFT's `bias` or PaddleNLP's `trainable_bias`."""
    said = values.get("bias") or values.get("trainable_bias") or "none"
    return "lora_only" if said == "lora" else said
