"""Adapters that other programs trained, under our names: PEFT's on llava-hf and on original LLaVA, PaddleMIX's.

    adapter_config.json, adapter_model.{safetensors,bin}    PEFT: TRL, LLaMA-Factory, ms-swift, original LLaVA
    non_lora_trainables.bin, config.json                    beside it: original LLaVA
    vit.safetensors, args.json                              beside it: ms-swift, what trained whole, the template
    paddlemix_processor.json                                beside it: ours, template and pixels
    lora_config.json, lora_model_state.pdparams             PaddleMIX

Sources: peft's save_pretrained; haotian-liu/LLaVA llava/model/builder.py (commit c121f04); PaddleNLP's LoRAConfig.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from paddlemix.checkpoints.adapters.peft_settings import adapter_settings, check_saved, read_settings
from paddlemix.checkpoints.files.tensors import TensorEntry, transposed
from paddlemix.checkpoints.files.weight_files import read_json, read_weight_file
from paddlemix.checkpoints.layouts.config_keys import ORIGINAL_KEYS, PROCESSOR_KEYS, TEMPLATE_KEY
from paddlemix.checkpoints.layouts.file_names import (
    ADAPTER_FILE,
    ADAPTER_PROCESSOR_FILE,
    CONFIG_FILE,
    PADDLEMIX_WEIGHTS,
    PEFT_ADAPTER_FILE,
    PEFT_OTHER_WEIGHTS,
    PEFT_WEIGHTS,
    SWIFT_WEIGHTS,
)
from paddlemix.checkpoints.layouts.weight_names import HF_5, HF_NEW, HF_OLD, ORIGINAL, PADDLEMIX, KeyMap
from paddlemix.checkpoints.source import rename
from paddlemix.config.foreign.templates import SWIFT_TEMPLATES, Named
from paddlemix.declared import take
from paddlemix.errors import MissingFileError, UserError
from paddlemix.log import logger
from paddlemix.peft.settings import MAGNITUDE, LoRAConfig

SWIFT_ARGUMENTS = "args.json"
# The model that PEFT wraps is "base_model.model"; a decoder wrapped without its output layer lacks one "model".
_WRAPPERS = ("base_model.model.", "base_model.")
_PEFT_LAYOUTS = (HF_NEW, HF_5, HF_OLD, ORIGINAL)
_LORA = re.compile(r"(.+)\.(lora_[AB]|lora_magnitude_vector)(?:\.default)?(?:\.weight)?")
# PEFT's names inside a layer that it wrapped: a bias that trained, a module that was saved whole
_INSIDE = re.compile(r"\.(base_layer|modules_to_save(\.default)?)\.")
_ORIGINAL_DECODER = ("language_model.layers.", "language_model.embed_tokens.", "language_model.norm.")
_NO_PLACE = {
    "lora_embedding_": "LoRA of the token embedding",
    "trainable_tokens_delta": "single trained rows of the token embedding",
    "lora_E": "AdaLoRA",
    "lora_B.bias": "a bias of lora_B",
}


@dataclass(frozen=True)
class ForeignAdapter:
    """An adapter of another program.

    Args:
        config: rank, scaling and adapted layers.
        base: "model", and what a text-only base gets in addition: "tower", "mm_projector_type" and so on.
        processor: the processor values that its files declare.
        tensors: its weights under our names, unread.
        names: our name of a weight -> the name that its file has, for messages.
    """

    config: LoRAConfig
    base: dict[str, Any]
    processor: dict[str, Any]
    tensors: dict[str, TensorEntry]
    names: dict[str, str] = field(default_factory=dict)


def read_foreign_adapter(directory: Path) -> ForeignAdapter:
    """Reads an adapter directory of PEFT or PaddleMIX.

    Raises:
        MissingFileError: a file is missing.
        UserError: a setting is not supported, or a weight belongs to no known layer.
    """
    # PEFT's weights may be of several models' names, PaddleMIX's of one
    is_peft = (directory / PEFT_ADAPTER_FILE).is_file()
    path = directory / (PEFT_ADAPTER_FILE if is_peft else ADAPTER_FILE)
    values = read_json(path)
    settings = read_settings(values, path)
    base = settings.get("base_model_name_or_path")
    if not base:
        raise UserError(f"{path} names no base model; set base_model_name_or_path to its folder")
    if is_peft:
        weights = _peft_files(directory)
        check_saved(settings, list(weights), path)
        keymap, plain = _unwrapped(weights, directory)
    else:
        weights = read_weight_file(directory / PADDLEMIX_WEIGHTS)
        keymap, plain = PADDLEMIX, {key: key for key in weights}
    named, names = under_our_names({plain[key]: entry for key, entry in weights.items()}, keymap, directory)
    # Three names of a weight: the file's, without PEFT's wrapper, ours.  Messages use the first.
    files = {value: key for key, value in plain.items()}
    spec = {**_declared(directory), "model": base, "relative": {"model": base}}
    # later wins: what ms-swift notes of the training, config.json beside the adapter, our own file
    processor = {**_swift_template(directory), **read_processor_values(directory)}
    own = directory / ADAPTER_PROCESSOR_FILE
    if own.is_file():
        processor |= take(read_json(own), PROCESSOR_KEYS, str(own))
    config = adapter_settings(values, named, keymap, path)
    return ForeignAdapter(config, spec, processor, named, {ours: files[key] for ours, key in names.items()})


def peft_tensors(directory: Path) -> dict[str, TensorEntry]:
    """The weights of a PEFT adapter under its own names.

    Raises:
        MissingFileError: there are none.
    """
    found = [directory / name for name in PEFT_WEIGHTS if (directory / name).is_file()]
    if not found:
        raise MissingFileError(f"no adapter weights in {directory}: expected {' or '.join(PEFT_WEIGHTS)}")
    return read_weight_file(found[0])


def _peft_files(directory: Path) -> dict[str, TensorEntry]:
    """The adapter's weights and the others that trained, under the files' names.

    Raises:
        UserError: a weight is of an unsupported kind.
    """
    tensors = peft_tensors(directory)
    for other in (PEFT_OTHER_WEIGHTS, SWIFT_WEIGHTS):
        if (directory / other).is_file():
            tensors = {**tensors, **read_weight_file(directory / other)}
    for key in tensors:
        kind = next((kind for mark, kind in _NO_PLACE.items() if mark in key), None)
        if kind is not None:
            raise UserError(f"{directory} holds '{key}': {kind} is not supported; merge it into its base with PEFT")
    # `export_peft` writes the tower's layers twice, for transformers 4 and 5: the older names are enough.
    # original_module is PEFT's copy of a module before training.
    both = {to_transformers_5(key) for key in tensors if to_transformers_5(key) != key}
    return {key: entry for key, entry in tensors.items() if key not in both and ".original_module." not in key}


def to_transformers_5(key: str) -> str:
    """An adapter weight's name in transformers 5, from that in 4.52 and later: a tower has no `vision_model`."""
    return key.replace(".vision_tower.vision_model.", ".vision_tower.", 1)


def _unwrapped(keys: Iterable[str], directory: Path) -> tuple[KeyMap, dict[str, str]]:
    """Which model's names an adapter's weights have: that model's keymap, and each key -> its name there.

    Raises:
        UserError: they belong to no known model; lists the keys that the nearest one lacks.
    """
    # all combinations, because the names alone tell which classes were wrapped; the first without a stranger wins
    best: list[str] | None = None
    for wrapper in _WRAPPERS:
        plain = {key: key.removeprefix(wrapper) for key in keys}
        for keymap in _PEFT_LAYOUTS:
            unknown = [key for key, name in plain.items() if not _is_known(_weight_of(name), keymap)]
            if not unknown:
                return keymap, plain
            if best is None or len(unknown) < len(best):
                best = unknown
    listed = ", ".join(f"'{key}'" for key in sorted(best or [])[:4])
    raise UserError(
        f"{directory} holds {len(best or [])} weights of layers that neither llava-hf nor original LLaVA has: {listed}"
        "; is it the adapter of another model?"
    )


def _is_known(key: str, keymap: KeyMap) -> bool:
    try:
        ours = keymap.to_ours(key)
    except KeyError:
        return False
    # original LLaVA's decoder is "model.", a prefix of llava-hf's other parts too
    return ours is None or not ours.startswith("language_model.") or ours.startswith(_ORIGINAL_DECODER)


def _weight_of(key: str) -> str:
    """The name of the base's weight that an adapter's weight belongs to or replaces."""
    match = _LORA.fullmatch(key)
    return f"{match.group(1)}.weight" if match else _INSIDE.sub(".", key)


def under_our_names(
    tensors: Mapping[str, TensorEntry], keymap: KeyMap, directory: Path
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """LoRA matrices as ours, A [in, r] and B [r, out], and the rest renamed as a checkpoint's weights are.

    Returns:
        The weights, and our name -> theirs.
    """
    named: dict[str, TensorEntry] = {}
    whole, names = {}, {}
    for key, entry in tensors.items():
        match = _LORA.fullmatch(key)
        try:
            name = keymap.to_ours(_weight_of(key))
        except KeyError as error:
            raise UserError(f"{directory}: the adapter weight '{key}' belongs to no layer of a LLaVA model") from error
        if match is None:
            whole[_weight_of(key)] = entry
        elif name is not None:
            part = match.group(2)
            name = f"{name.removesuffix('.weight')}.{part}"
            # torch has lora_A as [r, in] and lora_B as [out, r]; a magnitude is a vector
            turned = keymap.transposed and part != MAGNITUDE
            entry = replace(entry, origin=f"'{key}' of {directory}")
            named[name] = transposed(entry) if turned else entry
        if name is not None:
            names[name] = key
    return {**named, **rename(whole, (keymap,), directory)}, names


def read_processor_values(directory: Path) -> dict[str, Any]:
    """The processor values that an adapter's `config.json` declares, if it has one."""
    path = directory / CONFIG_FILE
    config = take(read_json(path), ORIGINAL_KEYS, str(path), tell=False) if path.is_file() else {}
    keys = ("image_aspect_ratio", "image_grid_pinpoints", "mm_patch_merge_type", "mm_vision_select_feature")
    values = {key: config.get(key) for key in (*keys, "mm_use_im_start_end")}
    return {key: value for key, value in {**values, "chat_template": config.get(TEMPLATE_KEY)}.items() if value}


def _swift_template(directory: Path) -> dict[str, Any]:
    """The template that ms-swift trained with, if it is one of ours; else a warning names it."""
    path = directory / SWIFT_ARGUMENTS
    name = read_json(path).get("template") if path.is_file() else None
    if not isinstance(name, str):
        return {}
    named = SWIFT_TEMPLATES.get(name, Named(None))
    if named.ours is not None and named.exact:
        return {"chat_template": named.ours}
    logger.warning(
        "%s was trained with ms-swift's template '%s', which is unknown here%s: the base's template is used; set "
        "chat_template (--conv-mode) to use another",
        directory,
        name,
        "" if named.ours is None else f" (the nearest is {named.ours})",
    )
    return {}


def _declared(directory: Path) -> dict[str, Any]:
    """What the adapter's config.json declares about the parts that a text-only base lacks."""
    path = directory / CONFIG_FILE
    config = take(read_json(path), ORIGINAL_KEYS, str(path), tell=False) if path.is_file() else {}
    if not config.get("mm_vision_tower"):
        return {}
    return {
        "tower": config["mm_vision_tower"],
        "mm_projector_type": config.get("mm_projector_type") or "linear",
        "mm_vision_select_layer": config.get("mm_vision_select_layer", -2),
        "mm_vision_select_feature": config.get("mm_vision_select_feature") or "patch",
        "image_newline": "unpad" in (config.get("mm_patch_merge_type") or "flat"),
    }
