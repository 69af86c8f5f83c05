"""adapter_config.json of PEFT and lora_config.json of PaddleNLP as our settings: every key is read, inert or refused.

A key in none of the tables below is refused unless it is empty: a newer PEFT may mean anything by it.
Sources: peft 0.21.2 LoraConfig and tuners/lora/layer.py; PaddleNLP 3.0.0b4 peft/lora/lora_config.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paddlemix import declared
from paddlemix.checkpoints.files.tensors import TensorEntry
from paddlemix.checkpoints.layouts.weight_names import KeyMap
from paddlemix.errors import UserError
from paddlemix.json_files import describe
from paddlemix.peft.settings import LoRAConfig

_MERGE_THERE = "merge it into its base there (PEFT: merge_and_unload) and use the merged model"


def _only_empty(effect: str) -> declared.Rule:
    """A key that is only allowed without a value; `effect` is what a value would do to the outputs."""

    def read(value: Any) -> Any:
        if value:
            raise ValueError
        return value

    return declared.Rule(f"null, false or empty (it means {effect})", read)


_START = declared.choice(
    True, False, "gaussian", "orthogonal", "eva", "mica", "pissa",
    because="others begin from a changed base that is not stored",
)  # fmt: skip
_KEYS = declared.Keys(
    read={
        "r": declared.integer(1, 1_000_000),
        "lora_alpha": declared.number(-1e9, 1e9),
        "lora_dropout": declared.number(0, 1),
        "use_rslora": declared.flag,
        "rslora": declared.flag,
        "use_dora": declared.flag,
        "pissa": declared.flag,
        "rank_pattern": declared.mapping,
        "alpha_pattern": declared.mapping,
        "init_lora_weights": _START,
        "bias": declared.text,
        "trainable_bias": declared.text,
        "base_model_name_or_path": declared.text,
        "modules_to_save": declared.items(declared.text),
    },
    refused={
        "lora_bias": _only_empty("a bias of lora_B"),
        "layer_replication": _only_empty("layers that are repeated"),
        "target_parameters": _only_empty("adapters of bare parameters"),
        "trainable_token_indices": _only_empty("single trained rows of the embedding"),
        "alora_invocation_tokens": _only_empty("an adapter that acts only after certain tokens"),
        "arrow_config": _only_empty("routing between several adapters"),
        "kasa_config": _only_empty("a base without its smallest singular values"),
        "monteclora_config": _only_empty("weights that are drawn at random"),
        "use_qalora": _only_empty("an adapter of pooled inputs"),
        "use_bdlora": _only_empty("block-diagonal matrices"),
        "enable_lora_list": _only_empty("adapters of parts of joined layers"),
        "lora_use_mixer": _only_empty("a third matrix between the two"),
        "use_mora": _only_empty("one square matrix instead of the two"),
        "loraga": _only_empty("a base that is changed at the start"),
        "do_qat": _only_empty("quantisation while training"),
    },
    harmless=frozenset(
        [
            # which layers are adapted: the weights show it
            *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "trainable_modules"),
            # what it is and how it was trained, started or stored
            *("peft_type", "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "runtime_config"),
            *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # count as `init_lora_weights` says
            *("velora_config", "ensure_weight_tying", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "dtype"),
            *("megatron_config", "megatron_core", "tensor_parallel_degree", "head_dim", "lora_plus_scale"),
            # without effect: PEFT disables fan_in_fan_out for linear layers, and a LLaVA model has no others
            *("fan_in_fan_out", "qalora_group_size", "merge_weights", "scaling", "use_quick_lora"),
        ]
    ),
)


def read_settings(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The settings that count, of a LoRA in which nothing unsupported changes the outputs.

    Args:
        values: content of the settings file at `path`.

    Returns:
        key -> value of those that have one.

    Raises:
        UserError: the adapter is of another kind, which is named, or keys are unsupported, each named with its value.
    """
    kind = values.get("peft_type") or "LORA"  # PaddleNLP's files have no such key
    if kind != "LORA":
        raise UserError(f"{path}: an adapter of kind '{kind}' (peft_type) is not supported, only LORA; {_MERGE_THERE}")
    known = {*_KEYS.read, *_KEYS.refused, *_KEYS.harmless}
    # an empty value of an unknown key is how PEFT writes a feature that is not used
    odd = [f"{key} is {describe(value)}" for key, value in values.items() if value and key not in known]
    if odd:
        raise UserError(
            f"{path}: {'; '.join(odd)}: unknown; remove it if it does not change the outputs, else {_MERGE_THERE}"
        )
    try:
        return declared.take({key: value for key, value in values.items() if key in known}, _KEYS, str(path))
    except UserError as error:
        raise UserError(f"{error}. An adapter that needs this: {_MERGE_THERE}") from error


def check_saved(values: Mapping[str, Any], keys: list[str], path: Path) -> None:
    """Checks that every module that PEFT was to save beside LoRA's weights has weights.

    Args:
        keys: names of all weights, as the adapter's files have them.

    Raises:
        UserError: names the modules without weights.
    """
    names = values.get("modules_to_save") or []
    # PEFT matches the end of a module's name: ".x." anywhere in a weight's name is that module
    lacking = [name for name in names if not any(f".{name}." in f".{key}" for key in keys)]
    if lacking:
        raise UserError(
            f"{path}: modules_to_save names {', '.join(map(str, lacking))}, but {path.parent} holds no weights of "
            "them; the adapter's files are not complete"
        )


def adapter_settings(
    values: Mapping[str, Any], tensors: Mapping[str, TensorEntry], keymap: KeyMap, path: Path
) -> LoRAConfig:
    """Settings in our terms; PEFT's patterns are resolved per layer.

    Args:
        values: content of the adapter's settings file at `path`.
        tensors: the adapter's weights under our names.
        keymap: the names that the file's patterns refer to.

    Raises:
        UserError: a setting is not supported, or the weights do not match the settings.
    """
    known = read_settings(values, path)
    modules = tuple(name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A"))
    theirs = {module: keymap.to_theirs(f"{module}.weight").removesuffix(".weight") for module in modules}
    odd = sorted(theirs[module] for module in modules if f"{module}.lora_B" not in tensors)
    if odd or not modules:
        raise UserError(f"{path.parent} has " + (f"no lora_B for '{odd[0]}'" if odd else "no LoRA weights"))
    try:
        config = _config(known, theirs)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:
        raise UserError(f"{path} cannot be understood: {error!r}") from error
    for module in modules:
        shape = tensors[f"{module}.lora_A"].shape
        # each wrong shape has one likely cause, which the message names
        if len(shape) == 4:
            layer = theirs[module].removesuffix(".weight")
            raise UserError(
                f"lora_A of '{layer}' in {path.parent} has 4 axes: LoRA of a convolution is not supported, only of "
                f"linear layers; {_MERGE_THERE}, or train it without this layer in target_modules"
            )
        if len(shape) != 2 or not all(shape):
            raise UserError(
                f"lora_A of '{theirs[module]}' in {path.parent} has the shape {list(shape)}: the adapter was saved "
                "from one part of a sharded model (DeepSpeed ZeRO-3, FSDP); save it again with all parts gathered"
            )
        if shape[1] != config.rank_of(module):
            found = f"of rank {shape[1]}, {path} has {config.rank_of(module)}"
            raise UserError(f"lora_A of '{theirs[module]}' is {found}; the two files are of different adapters")
    return config


def _config(values: Mapping[str, Any], theirs: Mapping[str, str]) -> LoRAConfig:
    """The settings of layers whose names are `theirs`, ours -> the file's."""
    is_paddlenlp_pissa = bool(values.get("pissa"))
    rank, alpha = int(values["r"]), float(values["lora_alpha"])
    if is_paddlenlp_pissa:
        alpha = float(rank)  # PaddleNLP scales PiSSA by 1
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
    """The value of the first pattern that matches the end of a layer's name, as in PEFT."""
    fitting = (value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(fitting, otherwise)


def _bias(values: Mapping[str, Any]) -> str:
    """Which biases train, from PEFT's `bias` or PaddleNLP's `trainable_bias`."""
    said = values.get("bias") or values.get("trainable_bias") or "none"
    return "lora_only" if said == "lora" else said
