"""Whether a resumed run is the one that was stopped: the keys that decide what its steps compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paddlemix.config.schema import SPECS, RunConfig
from paddlemix.errors import UserError
from paddlemix.log import logger

_RECIPE_TRAINING = (
    *("vision_tower", "projector", "language_model", "freeze_include", "freeze_exclude"),
    *("image_aspect_ratio", "image_grid_pinpoints", "mm_patch_merge_type", "vision_image_size"),
    *("mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "seed"),
    *("learning_rate", "mm_projector_lr", "mm_vision_tower_lr", "min_learning_rate", "lr_scheduler_type"),
    *("warmup_ratio", "warmup_steps", "num_cycles", "lr_end", "power"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("loss_reduction", "neftune", "neftune_noise_alpha"),
    *("dtype", "bf16", "fp16", "fp16_opt_level", "amp_master_grad", "amp_custom_black_list", "amp_custom_white_list"),
)
_LENGTH = ("num_train_epochs", "max_steps")
# of the groups "lora" and "data": where things are and how long to wait for them
_FREE = (
    *("cache_vision_features", "vision_cache_dir", "vision_cache_gb", "image_root"),
    *("pad_to_multiple_of", "pad_tiles_to_multiple_of"),
    *("image_timeout", "image_retries", "allow_local_network", "max_image_bytes", "max_image_pixels"),
)
RECIPE_KEYS = tuple(
    name
    for name, spec in SPECS.items()
    if spec.status == "used" and (name in _RECIPE_TRAINING or (spec.group in ("lora", "data") and name not in _FREE))
)


def recipe_values(config: RunConfig) -> dict[str, Any]:
    """The keys whose change would make a resumed run end differently from an undisturbed one."""
    return _without_remarks({name: getattr(config, name) for name in RECIPE_KEYS})


def _without_remarks(values: dict[str, Any]) -> dict[str, Any]:
    """Without `about`, which entries of `dataset` have for people."""
    # `about` tells people what to download; changing it changes no sample.
    dataset = {
        split: [{key: item for key, item in entry.items() if key != "about"} for entry in entries]
        for split, entries in (values.get("dataset") or {}).items()
    }
    return {**values, "dataset": dataset} if dataset else values


def check_same_recipe(checkpoint: Path, saved: dict[str, Any], config: RunConfig) -> None:
    """Compares a run with the one that saved a checkpoint.

    Args:
        saved: that run's `recipe_values`.

    Raises:
        UserError: keys differ and `allow_changed_recipe` is not set; lists them with both values.
    """
    # As JSON stores it: a tuple becomes a list, or equal values would differ.
    now = json.loads(json.dumps(recipe_values(config)))
    if config.lr_scheduler_type.startswith("constant"):  # its end then changes no step before
        saved = {name: value for name, value in saved.items() if name not in _LENGTH}
    changed = [
        f"{name} {saved[name]!r} -> {now[name]!r}" for name in RECIPE_KEYS if saved.get(name, now[name]) != now[name]
    ]
    if not changed:
        return
    text = f"{checkpoint} was saved by a run with other settings: {'; '.join(changed)}"
    if not config.allow_changed_recipe:
        raise UserError(f"{text}. Set them back, choose another output_dir, or set allow_changed_recipe true")
    logger.warning(text)
