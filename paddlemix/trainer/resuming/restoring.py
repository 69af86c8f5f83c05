"""A run continued from a checkpoint: its weights, optimiser, schedule and loss scale read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import paddle

from paddlemix.checkpoints.files.finite import finite
from paddlemix.checkpoints.files.weight_files import read_json
from paddlemix.checkpoints.pretrained import copy_into
from paddlemix.errors import UserError
from paddlemix.log import logger
from paddlemix.trainer.resuming.checkpoint_folders import STATE_FILE, own_checkpoints, saved_weights
from paddlemix.trainer.resuming.optimizer_state import load_optimizer


def load_training_state(trainer: Any, checkpoint: Path) -> int:
    """Restores weights, optimiser, schedule and loss scale.

    Returns:
        The optimiser steps done.

    Raises:
        MissingFileError, UserError: the checkpoint lacks a file or does not fit the model.
    """
    values = read_json(checkpoint / STATE_FILE)
    load_weights(trainer.model.model, checkpoint)
    trainer.own_checkpoints = own_checkpoints(checkpoint, Path(trainer.config.output_dir))
    trainer.tokens_seen, trainer.evaluations = values["tokens_seen"], values.get("evaluations", [])
    # Otherwise optimiser, schedule and scale start fresh, on the checkpoint's weights.
    if not trainer.config.ignore_load_lr_and_optim:
        load_optimizer(trainer, checkpoint)
        trainer.lr_scheduler.set_state_dict(values["schedule"])
        trainer.lr_scheduler.step(trainer.lr_scheduler.last_epoch)  # the rate is this run's, also where it was changed
        if trainer.do_grad_scaling and values["scaler"]:
            trainer.scaler.load_state_dict({key: np.asarray(item) for key, item in values["scaler"].items()})
    logger.info("resumed from %s at step %d", checkpoint, values["global_step"])
    return int(values["global_step"])


def load_weights(model: paddle.nn.Layer, checkpoint: Path) -> None:
    """Copies the weights of a checkpoint of this run into the model.

    Raises:
        UserError: a trained weight is not in the checkpoint.
    """
    entries = saved_weights(checkpoint)
    for name, parameter in model.named_parameters():
        if name in entries:
            if tuple(parameter.shape) != entries[name].shape:
                raise UserError(
                    f"{checkpoint}: {name} is {list(entries[name].shape)}, the run's is {list(parameter.shape)}; "
                    "resuming needs the settings of the run that saved it"
                )
            copy_into(parameter, finite(entries[name], f"'{name}' of {checkpoint}"))
        # A frozen weight comes from the base and may be missing; a trained one is nowhere else.
        elif not parameter.stop_gradient:
            raise UserError(
                f"{checkpoint} has no weight '{name}', which trains in this run; resuming needs the same settings"
            )
