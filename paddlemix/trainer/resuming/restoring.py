"""A run continued from a checkpoint: its weights, optimiser, schedule and loss scale read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from paddlemix.checkpoints.files.weight_files import read_json
from paddlemix.log import logger
from paddlemix.parallel.collectives import together
from paddlemix.trainer.paddlenlp_trainer import TrainerState
from paddlemix.trainer.resuming.best_checkpoint import best_checkpoint
from paddlemix.trainer.resuming.checkpoint_check import check_best
from paddlemix.trainer.resuming.checkpoint_folders import PROGRESS_FILE, STATE_FILE, completed_steps, own_checkpoints
from paddlemix.trainer.resuming.loading_shares import load_optimizer, load_weights


def load_training_state(trainer: Any, checkpoint: Path) -> int:
    """Restores weights, optimiser, schedule and loss scale.

    Returns:
        The optimiser steps done.

    Raises:
        MissingFileError, UserError: the checkpoint lacks a file or does not fit the model, on any process of the run.
    """
    with together():  # a process that cannot read its share would leave the others waiting in the first step
        return _load(trainer, checkpoint)


def load_best(trainer: Any) -> None:
    """Copies the weights of the best checkpoint, if there is one, into the model.

    Raises:
        MissingFileError, UserError: a file is missing, damaged or changed, on any process of the run.
    """
    with together():
        best = best_checkpoint(trainer)
        if best is not None:
            check_best(best)
            load_weights(trainer.model.model, best, trainer.layout)


def _load(trainer: Any, checkpoint: Path) -> int:
    values = read_json(checkpoint / STATE_FILE)
    load_weights(trainer.model.model, checkpoint, trainer.layout)
    _take_progress(trainer, checkpoint, values)
    # Otherwise optimiser, schedule and scale start fresh, on the checkpoint's weights.
    if not trainer.config.ignore_load_lr_and_optim:
        load_optimizer(trainer, checkpoint)
        trainer.lr_scheduler.set_state_dict(values["schedule"])
        trainer.lr_scheduler.step(trainer.lr_scheduler.last_epoch)  # the rate is this run's, also where it was changed
        if trainer.do_grad_scaling and values["scaler"]:
            trainer.scaler.load_state_dict({key: np.asarray(item) for key, item in values["scaler"].items()})
    logger.info("resumed from %s at step %d", checkpoint, values["global_step"])
    return int(values["global_step"])


def _take_progress(trainer: Any, checkpoint: Path, values: dict[str, Any]) -> None:
    trainer.own_checkpoints = own_checkpoints(checkpoint, Path(trainer.config.output_dir))
    trainer.exchange.tokens_seen, trainer.evaluations = values["tokens_seen"], values.get("evaluations", [])
    trainer.evaluation_due = values.get("evaluation_due", False)


def load_finished(trainer: Any, checkpoint: Path) -> None:
    """Restores weights and progress of a run of which nothing is left to train but whose result may be missing.

    Raises:
        MissingFileError, UserError: see `load_training_state`.
    """
    trainer.share_weights(completed_steps(checkpoint))  # else every card would get the whole model
    with together():
        load_weights(trainer.model.model, checkpoint, trainer.layout)
        trainer.state = TrainerState.load_from_json(str(checkpoint / PROGRESS_FILE))
        _take_progress(trainer, checkpoint, read_json(checkpoint / STATE_FILE))
