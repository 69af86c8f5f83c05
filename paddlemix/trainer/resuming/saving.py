"""Checkpoints of a run: complete or absent, enough to resume bit for bit, and usable as models themselves.

    checkpoint-N/  the model's or adapter's own files
                   optimizer.safetensors   moments and master weights under our parameter names; above 5 GiB in shards
                                           optimizer-0000k-of-0000n.safetensors with an index
                   training_state.json     step, schedule, loss scale, the run's configuration
                   trainer_state.json      PaddleNLP's progress record
                   checksums.json          size and digest of all of these, compared before a run resumes
                   inputs.safetensors      what the data files and pictures hold, see `input_identity`

Which files there are and what is in them does not depend on how many processes wrote them, or what each held.
Nothing is pickled.  Random numbers need no state: those of a step depend on seed and step alone.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paddlemix.checkpoints.files.directories import atomic_directory, remove_directory, writing
from paddlemix.checkpoints.files.finite import NotFiniteError
from paddlemix.checkpoints.files.joint_writing import DirectoryFiles, joint_directory, write_files
from paddlemix.checkpoints.files.shards import shard_files
from paddlemix.checkpoints.files.weight_files import write_index, write_json
from paddlemix.errors import UserError
from paddlemix.log import logger
from paddlemix.trainer.resuming.best_checkpoint import best_checkpoint, note_best
from paddlemix.trainer.resuming.checkpoint_check import Digests, file_digest, write_checksums
from paddlemix.trainer.resuming.checkpoint_folders import OPTIMIZER_INDEX, PROGRESS_FILE, STATE_FILE, list_checkpoints
from paddlemix.trainer.resuming.optimizer_state import optimizer_entries
from paddlemix.trainer.resuming.same_recipe import recipe_values


def save_checkpoint(trainer: Any, metrics: dict[str, float] | None) -> Path:
    """Writes `checkpoint-N` of the current step and removes those beyond `save_total_limit`; called by every process.

    Raises:
        UserError: it cannot be written by one of the processes, on all of them; earlier checkpoints are untouched.
    """
    output_dir, layout = Path(trainer.config.output_dir), trainer.layout
    target = output_dir / f"checkpoint-{trainer.state.global_step}"
    # On every process, so that all of them know which checkpoint is the best when the run ends.
    note_best(trainer, metrics, target)
    is_own = target.name in trainer.own_checkpoints
    # Before the state is written, which lists this checkpoint too.
    trainer.own_checkpoints = [name for name in trainer.own_checkpoints if name != target.name] + [target.name]
    digests: Digests = {}
    # A kill leaves a temporary name, never a checkpoint that is half written.
    place = joint_directory(_new_checkpoint(trainer, target, is_own, digests), layout)
    with what_is_left(target.name, trainer), place as temporary:
        digests |= write_files(temporary, _checkpoint_files(trainer, target), layout, file_digest)
    return target


@contextlib.contextmanager
def _new_checkpoint(trainer: Any, target: Path, is_own: bool, digests: Digests) -> Iterator[Path]:
    """What the first process does before and after all have written.

    Args:
        is_own: whether the run wrote a checkpoint of that name before.
        digests: filled until then with those of the tensor files.
    """
    # A checkpoint that this run did not write is kept under another name, never overwritten.
    if target.exists() and not is_own:
        _set_aside(target)
    with atomic_directory(target) as temporary:
        yield temporary
        write_checksums(temporary, digests)  # last, because it covers every other file
    best = best_checkpoint(trainer)
    kept = {target, *([] if best is None else [best])}
    _rotate([target.parent / name for name in trainer.own_checkpoints], trainer.config.save_total_limit, kept)


def _checkpoint_files(trainer: Any, target: Path) -> DirectoryFiles:
    model = trainer.model_files(target, trainer.layout)
    states = [] if trainer.config.ignore_save_lr_and_optim else shard_files("optimizer", optimizer_entries(trainer))

    def write_states(directory: Path) -> None:
        if states:
            write_index(directory / OPTIMIZER_INDEX, states)
        trainer.state.save_to_json(str(directory / PROGRESS_FILE))
        if trainer.input_identity is not None:
            trainer.input_identity.write(directory)
        write_json(directory / STATE_FILE, _state_values(trainer))

    return DirectoryFiles([*model.tensors, *states], [*model.others, write_states])


@contextlib.contextmanager
def what_is_left(name: str, trainer: Any) -> Iterator[None]:
    """Adds to an error while saving: what was not saved, after which step, and which checkpoint remains.

    Args:
        name: what is saved: a checkpoint's name, or "the result".

    Raises:
        UserError: in place of any other one.
    """
    try:
        yield
    except NotFiniteError as error:
        raise UserError(f"{name} was not saved: {broken_by_a_step(trainer, error.tensor, error.found)}") from error
    except UserError as error:
        raise UserError(f"{name} was not saved: {error}. {_earlier(Path(trainer.config.output_dir))}") from error


def broken_by_a_step(trainer: Any, tensor: str, found: str) -> str:
    """What to report of a tensor that a step of the run made NaN or infinite, and which checkpoint remains."""
    config = trainer.config
    return (
        f"{tensor} holds {found} after step {trainer.state.global_step}, made so by a step since the last checkpoint; "
        f"lower learning_rate ({config.learning_rate:g}), raise adam_epsilon ({config.adam_epsilon:g}) or set "
        f"max_grad_norm above 0 ({config.max_grad_norm:g}). {_earlier(Path(config.output_dir), 'whole')}"
    )


def _earlier(output_dir: Path, state: str = "untouched") -> str:
    checkpoints = list_checkpoints(output_dir)
    if not checkpoints:
        return "There is no earlier checkpoint: the run has to start over"
    return f"{checkpoints[-1].name} is {state}: the same command resumes from there"


def _state_values(trainer: Any) -> dict[str, Any]:
    scaler = trainer.scaler.state_dict() if trainer.do_grad_scaling else {}
    return {
        "global_step": trainer.state.global_step,
        "schedule": trainer.lr_scheduler.state_dict(),
        "scaler": {key: np.asarray(value).tolist() for key, value in scaler.items()},
        "tokens_seen": trainer.exchange.tokens_seen,
        "evaluations": trainer.evaluations,
        "evaluation_due": trainer.evaluation_due,
        "own_checkpoints": trainer.own_checkpoints,
        "recipe": recipe_values(trainer.config, trainer.args.dataset_world_size),
    }


def _set_aside(target: Path) -> None:
    """Renames a checkpoint of another run, or of later steps than this run was resumed from, before its name is taken.

    Raises:
        UserError: it cannot be renamed.
    """
    names = (target.with_name(f"{target.name}.earlier{number or ''}") for number in itertools.count())
    aside = next(path for path in names if not path.exists())
    with writing(aside):
        os.rename(target, aside)
    logger.warning("%s is not of this run; it is kept as %s", target, aside.name)


def _rotate(own: Sequence[Path], limit: int | None, kept: set[Path]) -> None:
    """Removes the oldest checkpoints until `limit` are left; those of `kept`, the best and the new one, always stay.

    Args:
        own: those that the run wrote, oldest first; it removes no others.
    """
    checkpoints = [path for path in own if (path / STATE_FILE).is_file()]
    # The best and the newest may be more than `limit` allows; they stay all the same.
    surplus = len(checkpoints) - limit if limit else 0
    for path in checkpoints:
        if surplus > 0 and path not in kept:
            remove_directory(path)
            surplus -= 1
