"""The adapters of an XTuner directory as one of ours: LoRA of the language model, LoRA of the tower, the projector.

In XTuner each part has its own rank and scale (512 and 256 against 64 and 16); here the tower's are a pattern.
A matrix that its model joins (InternLM2's `wqkv`) is several layers here: their A is the same, their B its columns.
Source: InternLM/xtuner 0.1.23 xtuner/model/llava.py; the files in each part are PEFT's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from paddlemix.checkpoints.adapters.foreign_adapter import ForeignAdapter, peft_tensors, under_our_names
from paddlemix.checkpoints.adapters.peft_settings import adapter_settings
from paddlemix.checkpoints.files.tensors import TensorEntry
from paddlemix.checkpoints.files.weight_files import read_json, read_weights
from paddlemix.checkpoints.layouts.families import FAMILIES
from paddlemix.checkpoints.layouts.file_names import PEFT_ADAPTER_FILE
from paddlemix.checkpoints.layouts.joined_weights import split_fused
from paddlemix.checkpoints.layouts.weight_names import CLIP, INTERNLM2, LLAMA, XTUNER_PROJECTOR, KeyMap
from paddlemix.checkpoints.layouts.xtuner_layout import (
    LANGUAGE_ADAPTER,
    TOWER_ADAPTER,
    XTunerParts,
    read_xtuner,
)
from paddlemix.checkpoints.source import open_language_model, rename
from paddlemix.errors import UserError
from paddlemix.log import logger
from paddlemix.peft.settings import MAGNITUDE, WEIGHTS, LoRAConfig

Tensors = dict[str, TensorEntry]
_TOWER, _WRAPPER = "vision_tower", "base_model.model."
_SAME = ("rslora", "use_dora", "pissa", "bias")  # settings that one of our adapters has only once


def read_xtuner_adapter(directory: Path) -> ForeignAdapter:
    """Reads an XTuner directory that holds adapters; the base is the same directory without them.

    Raises:
        MissingFileError: a file is missing, or no file says where a part is.
        UserError: a setting is not supported, or a weight belongs to no known layer.
    """
    parts = read_xtuner(directory)
    configs: list[LoRAConfig] = []
    tensors, names = rename(read_weights(parts.projector), (XTUNER_PROJECTOR,), parts.projector), dict[str, str]()
    for name, path in parts.adapters.items():
        config, found, files = _read_part(name, path, parts)
        configs.append(config)
        tensors |= found
        names |= {ours: f"{name}: {key}" for ours, key in files.items()}
    # The base is this very directory without its adapters: `inside` keeps it from being read as an adapter again.
    base = {
        "model": str(directory),
        "inside": True,
        "tower": parts.tower,
        "mm_projector_type": parts.mm_projector_type,
        "mm_vision_select_layer": parts.mm_vision_select_layer,
        "mm_vision_select_feature": "patch",
        "relative": {"model": "."},
    }
    config = _together(configs, list(parts.adapters), directory)
    return ForeignAdapter(config, base, parts.processor(), tensors, names)


def _read_part(name: str, path: Path, parts: XTunerParts) -> tuple[LoRAConfig, Tensors, dict[str, str]]:
    """Settings and weights of one of the two adapters, under our names and of our layers, and the names in its file."""
    plain = {key.removeprefix(_WRAPPER): (key, entry) for key, entry in peft_tensors(path).items()}
    keys = {key: entry for key, (_, entry) in plain.items()}
    split: Callable[[Tensors], Tensors] | None = None
    keymap: KeyMap = CLIP if name == TOWER_ADAPTER else LLAMA
    # InternLM2 alone joins its matrices; its layers have other names too
    if name == LANGUAGE_ADAPTER and any(".attention.wqkv." in key for key in keys):
        keymap, text = INTERNLM2, open_language_model(parts).config.text
        split = lambda tensors: split_fused(tensors, text, FAMILIES["internlm2"].fused)  # noqa: E731
    named, names = under_our_names(keys, keymap, path)
    config = adapter_settings(read_json(path / PEFT_ADAPTER_FILE), named, keymap, path / PEFT_ADAPTER_FILE)
    files = {ours: plain[key][0] for ours, key in names.items()}
    return (config, named, files) if split is None else (*_apart(config, named, split), files)


def _apart(config: LoRAConfig, named: Tensors, split: Callable[[Tensors], Tensors]) -> tuple[LoRAConfig, Tensors]:
    """An adapter of joined layers as one of the layers that we have."""
    result = {name: entry for name, entry in named.items() if not name.endswith((*WEIGHTS, MAGNITUDE))}
    ranks, alphas = dict[str, int](), dict[str, float]()
    modules: list[str] = []
    # y = x A B, and the outputs of the joined layer are those of its parts side by side: B is cut by columns, A shared
    for module in config.modules:
        entries = split({key: named[key] for key in (f"{module}.lora_B", f"{module}.{MAGNITUDE}") if key in named})
        result |= entries
        for ours in (key.removesuffix(".lora_B") for key in entries if key.endswith(".lora_B")):
            modules.append(ours)
            result[f"{ours}.lora_A"] = named[f"{module}.lora_A"]
            if config.rank_of(module) != config.r:
                ranks[ours] = config.rank_of(module)
            if config.alpha_of(module) != config.lora_alpha:
                alphas[ours] = config.alpha_of(module)
    return replace(config, modules=tuple(modules), rank_pattern=ranks, alpha_pattern=alphas), result


def _together(configs: list[LoRAConfig], names: list[str], directory: Path) -> LoRAConfig:
    """One adapter's settings; the tower's rank and scale become patterns beside the language model's.

    Raises:
        UserError: the two are of different kinds.
    """
    # Dropout differs in effect on training alone, so it is a warning; other differences change outputs.
    first = configs[0]
    if len(configs) == 1:
        return first
    second = configs[1]
    other = [key for key in _SAME if getattr(first, key) != getattr(second, key)]
    if other:
        said = ", ".join(f"{key} {getattr(first, key)!r} and {getattr(second, key)!r}" for key in other)
        raise UserError(f"{directory}: the adapters {' and '.join(names)} differ in {said}, which is not supported")
    if first.lora_dropout != second.lora_dropout:
        kept = first.lora_dropout
        logger.warning("%s: %s trains on with the dropout of %s, %s", directory, names[1], names[0], kept)
    return replace(
        first,
        modules=(*first.modules, *second.modules),
        rank_pattern={**first.rank_pattern, _TOWER: second.r, **second.rank_pattern},
        alpha_pattern={**first.alpha_pattern, _TOWER: second.lora_alpha, **second.alpha_pattern},
    )
