"""An adapter as PEFT's for a llava-hf model, with the names of transformers since version 4.52.

    adapter_config.json, adapter_model.safetensors    what `PeftModel.from_pretrained` reads
    paddlemix_processor.json                          template and pixels, which PEFT's files cannot hold

Weights that were trained whole become `modules_to_save`; a module that is saved is saved with all its weights.
Source: peft 0.21.2 utils/other.py (ModulesToSaveWrapper); transformers' LlavaForConditionalGeneration.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from paddlemix.checkpoints.adapters.adapter import AdapterFiles, read_adapter
from paddlemix.checkpoints.adapters.base_places import base_of
from paddlemix.checkpoints.adapters.foreign_adapter import to_transformers_5
from paddlemix.checkpoints.adapters.image_padding import with_adapter
from paddlemix.checkpoints.convert.complete_checkpoint import Checkpoint, read_checkpoint
from paddlemix.checkpoints.convert.declared_files import check_hf
from paddlemix.checkpoints.convert.export_adapter import (
    PEFT_WRAPPER,
    adapted_modules,
    check_image_size,
    log_base,
    peft_lora,
    peft_settings,
    split_adapter,
)
from paddlemix.checkpoints.convert.export_model import check_target
from paddlemix.checkpoints.files.directories import atomic_directory
from paddlemix.checkpoints.files.finite import all_finite
from paddlemix.checkpoints.files.tensors import TensorEntry, Tensors, converted, transposed
from paddlemix.checkpoints.files.weight_files import write_json, write_safetensors
from paddlemix.checkpoints.layouts.added_rows import append_added_rows, choose_vocabulary
from paddlemix.checkpoints.layouts.file_names import ADAPTER_PROCESSOR_FILE, PEFT_ADAPTER_FILE, PEFT_WEIGHTS
from paddlemix.checkpoints.layouts.weight_names import HF_NEW, is_linear_weight
from paddlemix.errors import UserError

_PROJECTOR, _EMBEDDINGS, _TOWER = "multi_modal_projector", "embeddings", "model.vision_tower.vision_model."


def export_peft_adapter(source: str | Path, target: str | Path, dtype: str | None = None) -> int:
    """Writes an adapter directory that PEFT loads on a llava-hf model.

    Args:
        source: an adapter directory of ours, original LLaVA's, PEFT's or PaddleMIX's; its base must be in place.
        target: must not exist, or be empty; appears whole or not at all.
        dtype: of the written weights; None keeps them.

    Returns:
        The number of written weights.

    Raises:
        MissingFileError, UserError: the adapter or its base cannot be used, llava-hf or PEFT cannot represent
            something, or the target cannot be written.
    """
    target = Path(target)
    check_target(target, source)
    adapter = read_adapter(Path(source))
    base = _base(adapter)
    lora, whole = split_adapter(adapter, dtype)
    modules = adapted_modules(lora)
    saved, others = _saved_modules(adapter, modules, whole, base)
    settings = peft_settings(adapter, modules, HF_NEW) | {"modules_to_save": saved or None}
    settings["target_modules"] = [_suffix(name) for name in settings["target_modules"]]
    for key in ("rank_pattern", "alpha_pattern"):
        settings[key] = {_suffix(name): value for name, value in settings[key].items()}
    # For transformers 5, which names the tower's layers differently, PEFT renames LoRA's weights only
    of_5 = {to_transformers_5(name): entry for name, entry in others.items()}
    written = {**dict(peft_lora(lora, HF_NEW)), **others, **of_5}
    with atomic_directory(target) as temporary:
        write_json(
            temporary / PEFT_ADAPTER_FILE, {**settings, "base_model_name_or_path": str(base.directory.resolve())}
        )
        write_json(temporary / ADAPTER_PROCESSOR_FILE, base.facts.processor)
        write_safetensors(temporary / PEFT_WEIGHTS[0], all_finite(written), {"format": "pt"})
    log_base(base.directory, "hf", "PEFT", "hf")
    return len(written)


def _base(adapter: AdapterFiles) -> Checkpoint:
    """The adapter's base with the adapter's processor.

    Raises:
        UserError: it is not a whole model, or llava-hf cannot represent it.
    """
    spec = base_of(adapter)
    base = read_checkpoint(Path(spec.model))
    if base.facts.config.vision is None:
        raise UserError(
            f"the adapter's base {spec.model} is just a language model, not a llava-hf model; merge the adapter "
            "first (paddlemix merge-lora) and convert the result (--to hf)"
        )
    check_image_size(spec, base.facts.config)
    facts = replace(base.facts, processor=with_adapter(base.facts.processor, adapter))
    check_hf(facts)
    return replace(base, facts=facts)


def _saved_modules(
    adapter: AdapterFiles, adapted: tuple[str, ...], whole: Tensors, base: Checkpoint
) -> tuple[list[str], dict[str, TensorEntry]]:
    """What PEFT saves beside LoRA's weights.

    Returns:
        modules_to_save, and the weights under PEFT's names and in its orientation: those of the saved modules and the
        biases that trained beside adapters.

    Raises:
        UserError: PEFT cannot hold a weight, or the vocabulary has other rows.
    """
    vocabulary = base.added or choose_vocabulary(base.directory, base.tensors, base.facts.config.text.vocab_size)
    full = append_added_rows(base.tensors, vocabulary)
    own = _without_newline(whole, full, adapter.directory)
    # an embedding or output layer without the rows that llava-hf adds to a vocabulary gets the base's
    short = {name: own[name] for name in own.keys() & vocabulary.rows if own[name].shape == base.tensors[name].shape}
    own |= append_added_rows(short, vocabulary)
    written, modules = dict[str, TensorEntry](), set[str]()
    for name, entry in own.items():
        module, _, part = name.rpartition(".")
        # | a weight that trained whole                    | is written as                          |
        # |------------------------------------------------|----------------------------------------|
        # | of an adapted layer, e.g. its bias             | the base_layer inside the adapted one  |
        # | another bias, with bias="all"                  | itself                                 |
        # | anything else                                  | a module of modules_to_save, whole     |
        if module in adapted:
            inside = _theirs(name).removesuffix(part) + f"base_layer.{part}"
            written[PEFT_WRAPPER + inside] = _turned(name, entry)
        elif adapter.config.bias == "all" and part == "bias" and f"{module}.weight" not in own:
            written[PEFT_WRAPPER + _theirs(name)] = entry
        else:
            modules.add(_module_of(name, adapted))
    # A saved module is complete: its weights that did not train are the base's.
    for name, entry in full.items():
        if _module_of(name, adapted) not in modules:
            continue
        taken = own.get(name, entry)
        if taken.shape != entry.shape:
            raise UserError(f"'{_theirs(name)}' of {adapter.directory} is {taken.shape}, its base has {entry.shape}")
        written[PEFT_WRAPPER + _theirs(name)] = _turned(name, taken)
    return sorted(modules), written


def _turned(name: str, entry: TensorEntry) -> TensorEntry:
    """One of our weights in the orientation of torch."""
    return transposed(entry) if is_linear_weight(name, entry.shape) else entry


def _without_newline(whole: Tensors, full: Tensors, directory: Path) -> dict[str, TensorEntry]:
    """Without LLaVA-1.6's newline, which is not a module: PEFT cannot save it, and need not unless it trained."""
    found = [converted(part["image_newline"], "F32").read() for part in (whole, full) if "image_newline" in part]
    if "image_newline" in whole and not (len(found) == 2 and np.array_equal(found[0], found[1])):
        raise UserError(
            f"{directory} trained image_newline, which PEFT cannot hold; merge the adapter (paddlemix merge-lora) "
            "and convert the result (--to hf)"
        )
    return {name: entry for name, entry in whole.items() if name != "image_newline"}


def _module_of(name: str, adapted: tuple[str, ...]) -> str:
    """The llava-hf module that PEFT saves one of our weights with."""
    theirs = _theirs(name)
    if theirs.startswith(_TOWER + _EMBEDDINGS):  # the class token is a parameter of it
        return _EMBEDDINGS
    # one name for the whole projector, unless single layers of it are adapted
    if name.startswith("projector.") and not any(module.startswith("projector.") for module in adapted):
        return _PROJECTOR
    return _suffix(theirs.rpartition(".")[0])


def _suffix(module: str) -> str:
    """The end of a llava-hf module's name that tells it from any other, in transformers 5 too: its towers have no
    `vision_model`.  PEFT looks for modules by the ends of their names."""
    return module.removeprefix(_TOWER).removeprefix("model.")


def _theirs(name: str) -> str:
    return HF_NEW.to_theirs(name)
