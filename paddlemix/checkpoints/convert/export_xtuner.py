"""Our adapter as XTuner keeps one: `llm_adapter/`, `visual_encoder_adapter/` and `projector/`.

XTuner's adapters are based on a separate language model and tower; so must ours be.  If one of them has no adapter,
only `xtuner_config.py` names it, as in the output of XTuner's own conversion; its chat takes both as flags.
Source: InternLM/xtuner 0.1.23 xtuner/model/llava.py (to_xtuner_llava); the files in each part are PEFT's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from paddlemix.checkpoints.adapters.adapter import AdapterFiles, read_adapter
from paddlemix.checkpoints.adapters.base_places import base_of
from paddlemix.checkpoints.base_model import BaseSpec, attach_tower
from paddlemix.checkpoints.convert.declared_files import Facts, check_xtuner, xtuner_projector_config
from paddlemix.checkpoints.convert.export_adapter import (
    check_image_size,
    peft_lora,
    peft_settings,
    place_of,
    plain_of_pissa,
)
from paddlemix.checkpoints.convert.export_model import check_target, to_layout
from paddlemix.checkpoints.files.directories import atomic_directory
from paddlemix.checkpoints.files.finite import all_finite
from paddlemix.checkpoints.files.tensors import FLOAT_TYPES, TensorEntry, converted
from paddlemix.checkpoints.files.weight_files import write_json, write_safetensors
from paddlemix.checkpoints.hub.resolve import resolve_model
from paddlemix.checkpoints.layouts.config_keys import TEMPLATE_KEY
from paddlemix.checkpoints.layouts.families import FAMILIES
from paddlemix.checkpoints.layouts.file_names import CONFIG_FILE, PEFT_ADAPTER_FILE, PEFT_WEIGHTS
from paddlemix.checkpoints.layouts.towers import CLIP_FORM, tower_form
from paddlemix.checkpoints.layouts.weight_names import XTUNER_PROJECTOR, KeyMap
from paddlemix.checkpoints.layouts.xtuner_layout import (
    LANGUAGE_ADAPTER,
    LANGUAGE_MODEL_KEY,
    PROJECTOR,
    RUN_FILE,
    TOWER_ADAPTER,
    TOWER_KEY,
    log_template,
)
from paddlemix.checkpoints.source import Source, open_source
from paddlemix.errors import UserError
from paddlemix.models.configuration import LlavaConfig
from paddlemix.models.presets import parameter_shapes
from paddlemix.peft.settings import is_adapter_weight

_WEIGHTS = "model.safetensors"


def export_xtuner_adapter(source: str | Path, target: str | Path, dtype: str | None = None) -> int:
    """Writes an adapter directory in XTuner's form.

    Args:
        source: an adapter directory on a language model and a tower; both must be in place.
        target: must not exist, or be empty; appears whole or not at all.
        dtype: of the written weights; None keeps them.

    Returns:
        The number of weights.

    Raises:
        MissingFileError, UserError: the adapter or its base cannot be used, XTuner's form cannot represent something,
            or the target cannot be written.
    """
    target = Path(target)
    check_target(target, source)
    adapter = read_adapter(Path(source))
    spec = base_of(adapter)
    config = _base_config(spec, adapter)
    tensors = adapter.tensors()
    if dtype is not None:
        tensors = {name: converted(entry, FLOAT_TYPES[dtype]) for name, entry in tensors.items()}
    # LoRA goes to the two parts' adapters, what is left must be the projector
    lora = {name: entry for name, entry in tensors.items() if is_adapter_weight(name)}
    projector = _projector({name: entry for name, entry in tensors.items() if name not in lora}, config, adapter)
    # XTuner declares one type for the whole: the projector's, which every such adapter has
    kinds = {value: key for key, value in FLOAT_TYPES.items()}
    stored = kinds[next(iter(projector.values())).dtype]
    facts = Facts(config=config, processor=adapter.processor, special_ids={}, dtype=stored)
    check_xtuner(facts)
    keymap = FAMILIES[config.text.model_type].keymap
    log_template(adapter.processor.get("chat_template"))
    with atomic_directory(target) as temporary:
        _write_part(temporary / LANGUAGE_ADAPTER, adapter, lora, (keymap, "language_model.", spec.model))
        _write_part(temporary / TOWER_ADAPTER, adapter, lora, (CLIP_FORM.keymaps[0], "vision_tower.", str(spec.tower)))
        # the run's file is Python that is read, never run: two assignments are enough
        places = {LANGUAGE_MODEL_KEY: place_of(spec.model), TOWER_KEY: place_of(str(spec.tower))}
        lines = [f"{key} = {place!r}\n" for key, place in places.items()]
        (temporary / RUN_FILE).write_text("".join(lines), encoding="utf-8")
        (temporary / PROJECTOR).mkdir()
        template = {TEMPLATE_KEY: adapter.processor["chat_template"]} if "chat_template" in adapter.processor else {}
        write_json(temporary / PROJECTOR / CONFIG_FILE, {**xtuner_projector_config(facts), **template})
        write_safetensors(
            temporary / PROJECTOR / _WEIGHTS, all_finite(to_layout(projector, XTUNER_PROJECTOR)), {"format": "pt"}
        )
    return len(tensors)


def _base_config(spec: BaseSpec, adapter: AdapterFiles) -> LlavaConfig:
    """Sizes of the adapter's base.

    Raises:
        UserError: it is not a language model and a CLIP tower, or XTuner joins its attention weights.
    """
    text = open_source(spec.model, spec.inside)
    if text.config.vision is not None or spec.tower is None:
        raise UserError(
            f"the adapter's base {spec.model} is a whole model, but XTuner's adapters need a language model and a "
            "separate tower; merge the adapter first (paddlemix merge-lora) and convert the result"
        )
    # LoRA of q, k and v is three updates, LoRA of their joined matrix one: the sum of three has a higher rank
    if FAMILIES[text.config.text.model_type].fused:
        raise UserError(
            f"XTuner joins query, key and value of {spec.model}, so an adapter of each has no place; merge the "
            "adapter first (paddlemix merge-lora) and convert the result"
        )
    config = attach_tower(text, Source.open(resolve_model(spec.tower)), spec).config
    assert config.vision is not None
    check_image_size(spec, config)
    if tower_form(config.vision) is not CLIP_FORM:
        raise UserError(f"the adapter's tower {spec.tower} is not a CLIP tower, the only kind in XTuner's models")
    return config


def _projector(others: Mapping[str, TensorEntry], config: LlavaConfig, adapter: AdapterFiles) -> dict[str, TensorEntry]:
    """The weights other than LoRA's, which must be the projector and nothing else."""
    wanted = {name for name in parameter_shapes(config) if name.startswith("projector.")}
    missing, extra = sorted(wanted - others.keys()), sorted(others.keys() - wanted)
    if missing:
        raise UserError(f"{adapter.directory} has no projector, which XTuner's form needs: {', '.join(missing)}")
    if extra:
        raise UserError(f"XTuner's form has no place for {', '.join(extra[:8])} of {adapter.directory}")
    return dict(others)


def _write_part(
    directory: Path, adapter: AdapterFiles, lora: Mapping[str, TensorEntry], part: tuple[KeyMap, str, str]
) -> None:
    """One part's adapter, if it has one; `part` is its names, our prefix and where its model is."""
    keymap, prefix, base = part
    modules = tuple(module for module in adapter.config.modules if module.startswith(prefix))
    if not modules:
        return
    # PiSSA becomes plain LoRA, as for PEFT
    own = {name: entry for name, entry in lora.items() if name.startswith(prefix)}
    plain = dict(plain_of_pissa(own)) if adapter.config.pissa else own
    directory.mkdir()
    settings = peft_settings(adapter, modules, keymap) | {"base_model_name_or_path": place_of(base)}
    # PEFT wraps by task: a tower has none
    task = "CAUSAL_LM" if prefix == "language_model." else None
    write_json(directory / PEFT_ADAPTER_FILE, {**settings, "task_type": task})
    write_safetensors(directory / PEFT_WEIGHTS[0], all_finite(dict(peft_lora(plain, keymap))), {"format": "pt"})
