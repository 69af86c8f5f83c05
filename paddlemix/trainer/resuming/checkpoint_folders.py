"""Which checkpoints a run's folder holds, which of them are the run's own, and what one says of itself."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paddlemix.checkpoints.files.tensors import TensorEntry
from paddlemix.checkpoints.files.weight_files import read_json, read_safetensors, read_shards, read_weights
from paddlemix.checkpoints.layouts.file_names import ADAPTER_WEIGHTS
from paddlemix.errors import UserError
from paddlemix.trainer.resuming.same_recipe import PROCESSES_KEY

STATE_FILE, PROGRESS_FILE, CHECKSUMS_FILE = "training_state.json", "trainer_state.json", "checksums.json"
OPTIMIZER_FILE, OPTIMIZER_INDEX = "optimizer.safetensors", "optimizer.safetensors.index.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return [path for path in checkpoint_folders(output_dir) if (path / STATE_FILE).is_file()]


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """Every folder named `checkpoint-N`, complete or not, and every link of that name, oldest first."""
    if not output_dir.is_dir():
        return []
    found = {step: path for path in output_dir.iterdir() if (step := checkpoint_step(path)) is not None}
    # A link may lead to a disk that is not mounted: it counts, so that no older checkpoint silently takes its place.
    return [found[step] for step in sorted(found) if found[step].is_dir() or found[step].is_symlink()]


def is_in(checkpoint: Path, output_dir: Path) -> bool:
    """Whether a checkpoint is in a run's folder: itself, or as a link to where it was moved."""
    # Where it really is, and where its name is: either makes it the run's own.
    places = (checkpoint.resolve().parent, Path(os.path.abspath(checkpoint)).parent.resolve())
    return output_dir.resolve() in places


def completed_steps(checkpoint: Path) -> int:
    """Optimiser steps done when a checkpoint was saved.

    Raises:
        MissingFileError, UserError: the checkpoint is not complete.
    """
    return int(read_json(checkpoint / STATE_FILE)["global_step"])


def saved_recipe(checkpoint: Path) -> dict[str, Any]:
    """The keys and values that decided what the checkpoint's run computed; {} where it does not record them."""
    recipe = dict(read_json(checkpoint / STATE_FILE).get("recipe", {}))
    if recipe and PROCESSES_KEY not in recipe:
        processes = _counted_processes(checkpoint, recipe)
        return recipe if processes is None else {**recipe, PROCESSES_KEY: processes}
    return recipe


def _counted_processes(checkpoint: Path, recipe: Mapping[str, Any]) -> int | None:
    """How many processes shared the data of a run that did not say so, from the samples that it counted."""
    try:
        progress = read_json(checkpoint / PROGRESS_FILE)
        samples = progress["consumed_samples"] / progress["global_step"]
        processes = samples / (recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"])
    except (UserError, KeyError, TypeError, ZeroDivisionError):
        return None
    return int(processes) if processes >= 1 and processes == int(processes) else None


def own_checkpoints(checkpoint: Path, output_dir: Path) -> list[str]:
    """Names of the checkpoints in `output_dir` that the run wrote up to this one, oldest first.

    Raises:
        MissingFileError, UserError: the checkpoint is not complete.
    """
    if not is_in(checkpoint, output_dir):
        return []
    values = read_json(checkpoint / STATE_FILE)
    if "own_checkpoints" in values:
        return [str(name) for name in values["own_checkpoints"]]
    # of an earlier version, which did not say: earlier steps of the same recipe
    found = []
    for path in list_checkpoints(output_dir):
        with contextlib.suppress(UserError, KeyError, ValueError, TypeError):  # a damaged one is nobody's
            if completed_steps(path) <= values["global_step"] and saved_recipe(path) == saved_recipe(checkpoint):
                found.append(path.name)
    return found


def checkpoint_step(path: Path) -> int | None:
    """The N of a path that ends in `checkpoint-N`; None for any other."""
    match = _NAME.fullmatch(path.name)
    return None if match is None else int(match.group(1))


def saved_weights(checkpoint: Path) -> Mapping[str, TensorEntry]:
    is_adapter = (checkpoint / ADAPTER_WEIGHTS).is_file()
    return read_safetensors(checkpoint / ADAPTER_WEIGHTS) if is_adapter else read_weights(checkpoint)


def has_optimizer(checkpoint: Path) -> bool:
    """Whether a checkpoint holds the optimiser's states."""
    return (checkpoint / OPTIMIZER_FILE).is_file() or (checkpoint / OPTIMIZER_INDEX).is_file()


def optimizer_files(checkpoint: Path) -> Mapping[str, TensorEntry]:
    """The optimiser's states in a checkpoint, as `<our parameter name>|<kind>`, of one file or of shards with an index.

    Raises:
        MissingFileError, UserError: there are none, or a file is missing or damaged.
    """
    if (checkpoint / OPTIMIZER_INDEX).is_file():
        return read_shards(checkpoint / OPTIMIZER_INDEX)
    return read_safetensors(checkpoint / OPTIMIZER_FILE)
