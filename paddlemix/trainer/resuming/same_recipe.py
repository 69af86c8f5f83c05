"""Whether a resumed run is the one that was stopped: the keys that decide what its steps compute.

How the samples of a step are shared out is not among them: only their number is (`StepSize`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
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


PROCESSES_KEY = "data_processes"
_FACTORS = ("per_device_train_batch_size", "gradient_accumulation_steps", PROCESSES_KEY)


@dataclass(frozen=True)
class StepSize:
    """The samples of an optimiser step as a product: samples at once, passes, and processes with samples of their own.

    The sampler gives a step the same samples whatever the factors are, so that a run may be resumed by another number
    of processes.
    """

    batch_size: int
    passes: int
    processes: int

    @staticmethod
    def of(recipe: Mapping[str, Any]) -> StepSize | None:
        """That of a run's `recipe_values`; None where they do not say it."""
        factors = [recipe.get(name) for name in _FACTORS]
        known = [factor for factor in factors if type(factor) is int and factor >= 1]
        return StepSize(*known) if len(known) == len(factors) else None

    @property
    def samples(self) -> int:
        """Samples of a step."""
        return self.batch_size * self.passes * self.processes

    def __str__(self) -> str:
        return (
            f"{self.samples} (per_device_train_batch_size {self.batch_size} x gradient_accumulation_steps "
            f"{self.passes} x {_processes(self.processes)})"
        )

    def remedy(self, wanted: StepSize, fixed_batch: bool) -> str:
        """Which values give the wanted number of samples with this number of processes.

        Args:
            fixed_batch: whether the samples at once may not change.
        """
        if wanted.samples % self.processes:
            return f"only a number of processes that divides {wanted.samples} can make that"
        share = wanted.samples // self.processes
        if fixed_batch and share % wanted.batch_size:
            return f"{_processes(self.processes)} cannot make that; use {wanted.processes}"
        most = wanted.batch_size if fixed_batch else self.batch_size
        # As many at once as now, or the next fewer that come out even: more might not fit the device.
        at_once = next(size for size in range(min(most, share), 0, -1) if share % size == 0)
        values = f"gradient_accumulation_steps {share // at_once}"
        changed = "" if at_once == self.batch_size else f"per_device_train_batch_size {at_once} and "
        return f"with {_processes(self.processes)} set {changed}{values}"


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def recipe_values(config: RunConfig, processes: int = 1) -> dict[str, Any]:
    """What would make a resumed run end differently from an undisturbed one.

    Args:
        processes: that read different samples of a step.
    """
    return _without_remarks({name: getattr(config, name) for name in RECIPE_KEYS}) | {PROCESSES_KEY: processes}


def _without_remarks(values: dict[str, Any]) -> dict[str, Any]:
    """Without `about`, which entries of `dataset` have for people."""
    # `about` tells people what to download; changing it changes no sample.
    dataset = {
        split: [{key: item for key, item in entry.items() if key != "about"} for entry in entries]
        for split, entries in (values.get("dataset") or {}).items()
    }
    return {**values, "dataset": dataset} if dataset else values


def check_same_recipe(checkpoint: Path, saved: dict[str, Any], config: RunConfig, processes: int = 1) -> None:
    """Compares a run with the one that saved a checkpoint.

    Args:
        saved: that run's `recipe_values`.
        processes: of this run that read different samples of a step.

    Raises:
        UserError: keys or the samples of a step differ and `allow_changed_recipe` is not set; lists them with both
            values, and says which values make up the earlier step.
    """
    # As JSON stores it: a tuple becomes a list, or equal values would differ.
    now = json.loads(json.dumps(recipe_values(config, processes)))
    if config.lr_scheduler_type.startswith("constant"):  # its end then changes no step before
        saved = {name: value for name, value in saved.items() if name not in _LENGTH}
    step, compared = _changed_step(saved, now), _compared_keys(saved, now)
    changed = [
        f"{name} {saved[name]!r} -> {now[name]!r}" for name in compared if saved.get(name, now[name]) != now[name]
    ]
    changed += [] if step is None else [step]
    if not changed:
        return
    text = f"{checkpoint} was saved by a run with other settings: {'; '.join(changed)}"
    if not config.allow_changed_recipe:
        raise UserError(
            f"{text}. Set them back, choose another output_dir, set overwrite_output_dir true to start over, or "
            "allow_changed_recipe true to go on with other settings"
        )
    logger.warning(text)


def _compared_keys(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys whose values have to be equal."""
    # Samples of a step are compared          as
    #   its size is recorded, loss by tokens  their number (`_changed_step`)
    #   its size is recorded, loss by means   their number, and how many are in one mean
    #   not recorded (first versions)         each factor that is a key
    free = set(_FACTORS) if StepSize.of(saved) is not None else {PROCESSES_KEY}
    if not _by_tokens(now):
        free -= {"per_device_train_batch_size"}
    return [name for name in now if name not in free]


def _changed_step(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """In words, how a step has other samples than before; None where it has not."""
    before, after = StepSize.of(saved), StepSize.of(now)
    if before is None or after is None:
        return None
    if before.samples != after.samples:
        return f"global batch {before} -> {after}: {after.remedy(before, fixed_batch=not _by_tokens(now))}"
    if before.processes != after.processes:
        logger.info(
            "%s resuming a run of %d: each step has the same samples; dropout draws other numbers",
            _processes(after.processes),
            before.processes,
        )
    return None


def _by_tokens(recipe: Mapping[str, Any]) -> bool:
    """Whether a step's loss is one mean over its tokens, whatever micro-batches they come in."""
    return bool(recipe["loss_reduction"] == "tokens")
