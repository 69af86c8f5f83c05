"""Whether a checkpoint is as it was saved: checksums of its files, values of its states, one step in all of them.

Checked before a run resumes from it, when nothing of the run is loaded yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from paddlemix.checkpoints.files.weight_files import write_json
from paddlemix.errors import UserError
from paddlemix.identity import fresh_digest
from paddlemix.json_files import describe, read_object
from paddlemix.log import logger, process_rank
from paddlemix.trainer.resuming.checkpoint_folders import (
    CHECKSUMS_FILE,
    OPTIMIZER_FILE,
    PROGRESS_FILE,
    STATE_FILE,
    checkpoint_step,
    has_optimizer,
)

_MOST = 2**53  # of a counter
_Check = tuple[str, Callable[[Any], bool]]  # what is expected, in words, and whether a value is that


Digests = dict[str, dict[str, Any]]  # name of a file -> its "bytes" and "digest"


def write_checksums(directory: Path, known: Digests) -> None:
    """Writes `checksums.json`: size and digest of every other file of a finished checkpoint.

    Args:
        known: those that are computed already, by the processes that wrote the files.
    """
    paths = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    files = known | {name: file_digest(path) for name, path in paths.items() if name not in known}
    write_json(directory / CHECKSUMS_FILE, {"files": dict(sorted(files.items()))})


def file_digest(path: Path) -> dict[str, Any]:
    """Size and digest of a file."""
    return {"bytes": path.stat().st_size, "digest": fresh_digest(path)}


def check_checkpoint(checkpoint: Path, with_optimizer: bool = True) -> None:
    """Checks whether a checkpoint can be resumed; checksums are compared by the first process alone.

    A checkpoint of an earlier version has no checksums, which is logged.

    Args:
        with_optimizer: whether the run uses the optimiser's state too.

    Raises:
        UserError: a file is missing, damaged or changed, or steps contradict each other; names the file, and the newest
            earlier checkpoint that is whole.  Or it was saved without the optimiser's state.
    """
    problem = find_damage(checkpoint)
    if problem is not None:
        raise damaged(checkpoint, problem)
    if with_optimizer and not has_optimizer(checkpoint):
        raise UserError(
            f"{checkpoint} has no {OPTIMIZER_FILE}, as where it was saved with ignore_save_lr_and_optim; set "
            "ignore_load_lr_and_optim true to resume with a new optimiser and schedule, or overwrite_output_dir true "
            "to start over"
        )
    if not (checkpoint / CHECKSUMS_FILE).is_file():
        logger.info("%s has no checksums, it was saved by an earlier version: its files are used unchecked", checkpoint)


def check_best(checkpoint: Path) -> None:
    """Checks whether the weights that a run ends with can be loaded from its best checkpoint.

    Raises:
        UserError: a file is missing, damaged or changed.
    """
    problem = find_damage(checkpoint)
    if problem is not None:
        raise UserError(
            f"the weights of the best checkpoint, {checkpoint}, cannot be loaded: {problem}. Copy the file again, or "
            "set load_best_model_at_end false to end with the weights of the last step; then run the same command again"
        )


def damaged(checkpoint: Path, problem: str) -> UserError:
    """The error about a checkpoint that cannot be resumed, with what can be done instead."""
    return UserError(f"{checkpoint} cannot be resumed: {problem}. {_instead(checkpoint)}")


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None where nothing is."""
    try:
        state = _checked(checkpoint / STATE_FILE, _STATE)
        progress = _checked(checkpoint / PROGRESS_FILE, _PROGRESS)
        _check_steps(checkpoint, state, progress)
        # Reading every byte once is enough; the other processes would read the same files.
        if process_rank() == 0 and (checkpoint / CHECKSUMS_FILE).is_file():
            _check_files(checkpoint)
    except UserError as error:
        return str(error)
    return None


def _instead(checkpoint: Path) -> str:
    """What can be done instead: the newest whole checkpoint beside it that has fewer steps."""
    own_step = checkpoint_step(checkpoint)
    # A link named `checkpoint-N` is beside the run's others; any other link is not, but what it leads to is.
    folder = checkpoint.parent if own_step is not None else checkpoint.resolve().parent
    beside = {
        step: path
        for path in folder.iterdir()
        if (step := checkpoint_step(path)) is not None and (path / STATE_FILE).is_file()
    }
    # The newest one first; a checkpoint of later steps may be what the user wants to get away from.
    for step in sorted(beside, reverse=True):
        if (own_step is None or step < own_step) and find_damage(beside[step]) is None:
            path = beside[step]
            return f"{path.name} is whole: set resume_from_checkpoint to '{path}', or remove the damaged folder"
    return (
        "No earlier checkpoint beside it is whole: copy the file again, or set overwrite_output_dir true to start over"
    )


def _checked(path: Path, table: Mapping[str, _Check]) -> dict[str, Any]:
    values = read_object(path)
    for key, (expected, fits) in table.items():
        # What earlier versions did not write may be missing, but if it is there it has to be right.
        if key not in values and key not in _OPTIONAL:
            raise UserError(f"'{path}' has no key '{key}'")
        if key in values and not fits(values[key]):
            raise UserError(f"'{path}': {key} is {describe(values[key])}, expected {expected}")
    unknown = sorted(values.keys() - table.keys()) if table is _PROGRESS else []
    if unknown:
        raise UserError(f"'{path}' has the unknown key '{unknown[0]}'")
    return values


def _check_steps(checkpoint: Path, state: dict[str, Any], progress: dict[str, Any]) -> None:
    step, schedule = state["global_step"], state["schedule"]
    if checkpoint_step(checkpoint) not in (None, step):
        raise UserError(f"global_step of {STATE_FILE} is {step}, but the folder is {checkpoint.name}")
    if progress["global_step"] != step:
        raise UserError(f"global_step is {step} in {STATE_FILE} and {progress['global_step']} in {PROGRESS_FILE}")
    made = schedule["last_epoch"]  # fewer where steps were left out because float16 gradients overflowed
    if made > step or (made < step and not state["scaler"]):
        raise UserError(f"global_step of {STATE_FILE} is {step}, but its schedule is at step {made}")


def _check_files(checkpoint: Path) -> None:
    path = checkpoint / CHECKSUMS_FILE
    files = read_object(path).get("files")
    if not isinstance(files, dict) or not all(isinstance(item, dict) for item in files.values()):
        raise UserError(f"'{path}' lists no files")
    for name in (STATE_FILE, PROGRESS_FILE):
        if name not in files:
            raise UserError(f"'{path}' does not list {name}")
    for name, item in files.items():
        file = checkpoint / name
        # A damaged or foreign list must not lead out of the checkpoint.
        if ".." in Path(name).parts or not file.is_file():
            raise UserError(f"its file '{name}' is missing")
        size = file.stat().st_size
        if size != item.get("bytes"):
            raise UserError(f"'{name}' has {size} bytes, when it was saved it had {item.get('bytes')}")
        if fresh_digest(file) != item.get("digest"):
            raise UserError(f"'{name}' is not as it was saved: its checksum differs")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def _is_schedule(value: Any) -> bool:
    return isinstance(value, dict) and _is_count(value.get("last_epoch")) and _is_finite(value.get("last_lr"))


def _all(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _scale(value: Any) -> bool:
    return isinstance(value, bool) or _is_finite(value) or (isinstance(value, list) and all(map(_scale, value)))


def _or_null(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


_COUNT: _Check = ("a whole number of at least 0", _is_count)
_OBJECT: _Check = ("an object", lambda value: isinstance(value, dict))
_FLAG: _Check = ("true or false", lambda value: isinstance(value, bool))
_STATE: dict[str, _Check] = {
    "global_step": _COUNT,
    "schedule": ("an object with last_epoch and last_lr, both numbers", _is_schedule),
    "scaler": ("an object of numbers", lambda value: isinstance(value, dict) and all(map(_scale, value.values()))),
    "tokens_seen": _COUNT,
    "evaluations": ("a list of numbers", _all(_is_number)),
    "evaluation_due": _FLAG,
    "own_checkpoints": ("a list of texts", _all(lambda item: isinstance(item, str))),
    "recipe": _OBJECT,
}
_PROGRESS: dict[str, _Check] = {
    "epoch": ("a number of at least 0", lambda value: _is_finite(value) and value >= 0),
    "global_step": _COUNT,
    "consumed_samples": _COUNT,
    "max_steps": _COUNT,
    "num_train_epochs": ("a number", _is_finite),
    "total_flos": ("a number", _is_finite),
    "log_history": ("a list of objects", _all(lambda item: isinstance(item, dict))),
    "best_metric": ("a number or null", _or_null(_is_number)),
    "best_model_checkpoint": ("a text or null", _or_null(lambda value: isinstance(value, str))),
    "is_local_process_zero": _FLAG,
    "is_world_process_zero": _FLAG,
    "trial_name": ("a text or null", _or_null(lambda value: isinstance(value, str))),
    "trial_params": ("an object or null", _or_null(lambda value: isinstance(value, dict))),
}
# what earlier versions did not write
_OPTIONAL = {
    "evaluations",
    "evaluation_due",
    "own_checkpoints",
    "recipe",
    "consumed_samples",
    "trial_name",
    "trial_params",
}
