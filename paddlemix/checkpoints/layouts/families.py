"""Families of language models as data: how their files name, spell and default what the one decoder computes.

    read_text({"model_type": "mistral", "rope_theta": 1e6})      # DecoderConfig(num_key_value_heads=8, ...)
    write_text(config)                                           # the same in the family's own spelling

A family is an entry of `FAMILIES`; no code of `models/` knows it.  Values that a file omits are those of the family's
own configuration class.  What would be computed wrongly is an error.
Sources: transformers' LlamaConfig, MistralConfig and Qwen2Config; configuration_internlm.py of internlm/internlm-7b and
configuration_internlm2.py of internlm/internlm2-7b; llava/model/language_model of LLaVA-VL/LLaVA-NeXT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from paddlemix.checkpoints.layouts.config_keys import TEXT_KEYS
from paddlemix.checkpoints.layouts.weight_names import INTERNLM2, LLAMA, KeyMap
from paddlemix.declared import take, without_null
from paddlemix.errors import UserError
from paddlemix.models.configuration import DecoderConfig, pick_fields

_LLAMA_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@dataclass(frozen=True, kw_only=True)
class Family:
    """Language models of one `model_type`.

    Args:
        architecture: class name in config.json of the language model alone.
        template: conversation template if the files name none.
        llava: (model_type, architecture) of original LLaVA on it; None: it is written there as a Llama.
        keymap: names of its weights.
        defaults: values that its files may omit, as far as they differ from `DecoderConfig`'s.
        fixed: values that its files cannot choose.
        spelling: our field -> its key.
        special_ids: `bos_token_id`, `eos_token_id`, `pad_token_id` if the files name none.
        fused: its joined weights, see `joined_weights.split_fused`.
    """

    architecture: str
    template: str
    llava: tuple[str, str] | None = None
    keymap: KeyMap = LLAMA
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    spelling: Mapping[str, str] = field(default_factory=dict)
    special_ids: Mapping[str, int] = field(default_factory=lambda: dict(_LLAMA_IDS))
    fused: tuple[str, ...] = ()


_NO_WINDOW: dict[str, Any] = {"sliding_window": None, "attention_output_bias": None}
FAMILIES: dict[str, Family] = {
    # Vicuna, Yi and Llama 3 are Llama with other numbers
    "llama": Family(
        architecture="LlamaForCausalLM",
        llava=("llava_llama", "LlavaLlamaForCausalLM"),
        template="vicuna_v1",
        fixed=_NO_WINDOW,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        llava=("llava_mistral", "LlavaMistralForCausalLM"),
        template="mistral_instruct",
        defaults={
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        fixed={"attention_bias": False, "attention_output_bias": None},
    ),
    "qwen2": Family(  # Qwen1.5 too
        architecture="Qwen2ForCausalLM",
        llava=("llava_qwen", "LlavaQwenForCausalLM"),
        template="qwen_1_5",
        defaults={
            "vocab_size": 151936,
            "intermediate_size": 22016,
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        fixed={"attention_bias": True, "attention_output_bias": False},
        special_ids={"bos_token_id": 151643, "eos_token_id": 151643, "pad_token_id": 151643},
    ),
    "internlm": Family(
        architecture="InternLMForCausalLM",
        template="internlm",
        defaults={"vocab_size": 103168, "bias": True, "rotary": {"base": 10000, "type": "dynamic"}},
        fixed={**_NO_WINDOW, "num_key_value_heads": None, "head_dim": None},
        spelling={"attention_bias": "bias"},
    ),
    "internlm2": Family(
        architecture="InternLM2ForCausalLM",
        template="internlm2_chat",
        keymap=INTERNLM2,
        defaults={"vocab_size": 103168, "bias": True},
        fixed={**_NO_WINDOW, "head_dim": None},
        spelling={"attention_bias": "bias"},
        fused=("fuse_attention_qkv",),
    ),
}
# Any of the names that a config.json may have for a family, original LLaVA's included -> the family.
LLAVA_ARCHITECTURES = {family.llava[1] for family in FAMILIES.values() if family.llava}
_NAMES = {
    name: model_type
    for model_type, family in FAMILIES.items()
    for name in (model_type, family.architecture, *(family.llava or ()))
}


def find_family(config: Mapping[str, Any]) -> str:
    """The `model_type` of a config.json's language model, for original LLaVA too.

    Raises:
        UserError: it is not one of `FAMILIES`.
    """
    architectures = config.get("architectures") or ()
    found = [_NAMES[name] for name in (config.get("model_type"), *architectures) if name in _NAMES]
    if found:
        return found[0]
    if config.get("model_type") == "llava" and not architectures:
        return "llama"  # the first LLaVA knew no other
    raise UserError(
        f"model_type '{config.get('model_type')}' with architectures {config.get('architectures')} is not supported as "
        f"a language model; allowed: {', '.join(FAMILIES)}"
    )


def read_text(values: Mapping[str, Any], model_type: str | None = None, where: str = "") -> DecoderConfig:
    """Sizes of a language model from its config.json, in any of the families' spellings.

    Args:
        values: the file's content.
        model_type: a key of `FAMILIES`; None: as in `values`, "llama" if they do not have it.
        where: the file, for errors and for a warning about unknown keys, which are ignored without it.

    Raises:
        UserError: the family is unknown, a value is not allowed, or something in the file cannot be computed.
    """
    values = take(values, TEXT_KEYS, where, tell=bool(where))
    model_type = values.get("model_type", "llama") if model_type is None else model_type
    if model_type not in FAMILIES:
        raise UserError(f"language model_type '{model_type}' is not one of {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    # Later wins: the family's defaults, the file, our spelling of its keys, positions in our form, what is fixed.
    merged = {**family.defaults, **values}
    merged |= {ours: merged[theirs] for ours, theirs in family.spelling.items() if theirs in merged}
    merged |= {**_read_rope(merged), **family.fixed, "model_type": model_type}
    if merged.get("sliding_window") is not None:
        merged["sliding_window"] = _read_window(merged)
    return pick_fields(DecoderConfig, merged)


def _read_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` from what transformers 4, transformers 5 or InternLM's own code writes.

    | key             | written by                     | holds                                  |
    |-----------------|--------------------------------|----------------------------------------|
    | rope_parameters | transformers 5                 | both in one object                     |
    | rotary          | InternLM's own code            | "base", "type", "scaling_factor"       |
    | rope_scaling    | transformers 4                 | scaling, beside `rope_theta`           |
    """
    theta, scaling = values.get("rope_theta"), values.get("rope_scaling")
    if values.get("rope_parameters") is not None:  # transformers 5 has both in one
        scaling = without_null(values["rope_parameters"])
        theta = take({"rope_theta": scaling.pop("rope_theta", theta)}, TEXT_KEYS, "rope_parameters").get("rope_theta")
        if scaling.pop("partial_rotary_factor", 1) != 1:
            raise UserError(
                f"rope_parameters {values['rope_parameters']} rotate only a part of each head, which is not supported"
            )
    elif "rotary" in values and scaling is None:  # InternLM's "origin" is the plain one
        rotary = values["rotary"]
        theta, kind = rotary.get("base", theta), rotary.get("type", "origin")
        scaling = None if kind == "origin" else {"type": kind, "factor": rotary.get("scaling_factor", 1.0)}
    if scaling is not None:
        scaling = without_null(scaling)
        older = scaling.pop("type", None)  # its name before transformers 4.43
        scaling.setdefault("rope_type", older)
        scaling = None if scaling["rope_type"] == "default" else scaling
    return {"rope_theta": theta, "rope_scaling": scaling}


def _read_window(values: Mapping[str, Any]) -> int | None:
    """The window of all layers; Qwen2's files can disable it, or enable it from layer `max_window_layers` on."""
    if values.get("use_sliding_window") is False:
        return None
    layers = values.get("num_hidden_layers", DecoderConfig.num_hidden_layers)
    first = values.get("max_window_layers", 0) if values.get("use_sliding_window") else 0
    kinds = set(values.get("layer_types") or ())
    # no layer has it: too few layers, or all of them declared to have full attention
    if first >= layers or kinds == {"full_attention"}:
        return None
    if first > 0 or len(kinds) > 1:
        raise UserError(
            f"sliding_window {values['sliding_window']} for the layers from {first} of {layers} on (layer_types "
            f"{values.get('layer_types')}) is not supported; allowed: for all layers or none"
        )
    return int(values["sliding_window"])


def write_text(text: DecoderConfig) -> dict[str, Any]:
    """What `read_text` reads, in the spelling of `text.model_type`; every known value is written.

    Raises:
        UserError: the family's files cannot express it.
    """
    family = FAMILIES[text.model_type]
    values = {key: value for key, value in asdict(text).items() if value is not None and key not in family.fixed}
    values |= {"num_key_value_heads": text.key_value_heads, "use_cache": True}
    values |= {theirs: values.pop(ours) for ours, theirs in family.spelling.items()}
    if "sliding_window" in family.defaults:
        values["sliding_window"] = text.sliding_window
    if "use_sliding_window" in family.defaults:
        windowed = text.sliding_window is not None
        values |= {"use_sliding_window": windowed, "max_window_layers": 0 if windowed else text.num_hidden_layers}
    values |= _write_rope(text, "rotary" in family.defaults)
    # written and read back: what a family's files cannot express must not be lost silently
    lost = {key: value for key, value in _meant(text).items() if _meant(read_text(values))[key] != value}
    if lost:
        raise UserError(f"config.json of a {family.architecture} has no place for {lost}")
    return values


def _meant(text: DecoderConfig) -> dict[str, Any]:
    """All values, with derived ones in place of those that may be left open."""
    derived = {"head_dim": text.head_size, "num_key_value_heads": text.key_value_heads}
    return {**asdict(text), **derived, "attention_output_bias": text.output_bias}


def _write_rope(text: DecoderConfig, rotary: bool) -> dict[str, Any]:
    """Scaling of positions; older configuration classes accept only "type" and "factor"."""
    scaling = text.rope_scaling
    if rotary:
        scaled = {} if scaling is None else {"scaling_factor": scaling["factor"]}
        return {"rotary": {"base": text.rope_theta, "type": "origin", **scaled} | _kind(scaling), "rope_scaling": None}
    # a scaling with further keys (Llama 3, YaRN) is written whole: only newer classes know it
    if scaling is not None and set(scaling) == {"rope_type", "factor"}:
        scaling = {**_kind(scaling), "factor": float(scaling["factor"])}
    return {"rope_scaling": scaling}


def _kind(scaling: Mapping[str, Any] | None) -> dict[str, str]:
    return {} if scaling is None else {"type": scaling["rope_type"]}


def inside_llava(text: DecoderConfig) -> DecoderConfig:
    """The same sizes under the family that represents it inside original LLaVA and llava-hf.

    InternLM and InternLM2 compute what a Llama with the same numbers does, once InternLM2's joined weights are apart.
    """
    return text if FAMILIES[text.model_type].llava else replace(text, model_type="llama")
