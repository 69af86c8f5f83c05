"""A checkpoint's weights and optimiser states into this process's share of them, whatever the layout of the run.

Checkpoints hold whole tensors.  Every process maps the files and copies what it holds: all of a tensor, its rows or
columns of it (tensor parallelism), a slice of it (stage 3), or nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import paddle

from paddlemix.checkpoints.files.copying import copy_into, own_part
from paddlemix.checkpoints.files.finite import finite
from paddlemix.checkpoints.files.tensors import TensorEntry, flat_slice
from paddlemix.errors import UserError
from paddlemix.parallel.layout import Layout
from paddlemix.parallel.shares import FACTORS, MASTER, Slice, adamw_of, make_states, slice_of, state_holders, states_of
from paddlemix.parallel.tensor.parts import part_of, whole_shape
from paddlemix.trainer.resuming.checkpoint_folders import optimizer_files, saved_weights


def load_weights(model: paddle.nn.Layer, checkpoint: Path, layout: Layout) -> None:
    """Copies the weights of a checkpoint of this run into the model.

    Raises:
        UserError: a trained weight is not in the checkpoint, or one has another shape, or is NaN or infinite.
    """
    entries = saved_weights(checkpoint)
    for name, parameter in model.named_parameters():
        if name in entries:
            shape = whole_shape(parameter)
            if shape != entries[name].shape:
                raise UserError(
                    f"{checkpoint}: {name} is {list(entries[name].shape)}, the run's is {list(shape)}; "
                    "resuming needs the settings of the run that saved it"
                )
            held, entry = slice_of(parameter, layout.sharding_rank), own_part(entries[name], part_of(parameter))
            _copy(entry, parameter if held is None else held.tensor, held, f"'{name}' of {checkpoint}")
        # A frozen weight comes from the base and may be missing; a trained one is nowhere else.
        elif not parameter.stop_gradient:
            raise UserError(
                f"{checkpoint} has no weight '{name}', which trains in this run; resuming needs the same settings"
            )


def load_optimizer(trainer: Any, checkpoint: Path) -> None:
    """Copies the optimiser's states; of a weight that had no gradient yet they stay at their start values.

    Raises:
        UserError: the checkpoint holds states that this run does not have, or one is NaN or infinite.
    """
    saved, layout = optimizer_files(checkpoint), trainer.layout
    parameters = dict(trainer.model.model.named_parameters())
    # State for a weight that is not here means another model or another set of trained parts.
    unknown = sorted({key.split("|")[0] for key in saved} - parameters.keys())
    if unknown:
        raise UserError(f"{checkpoint} holds the optimiser's state of '{unknown[0]}', which this run does not have")
    by_weight: dict[str, dict[str, TensorEntry]] = {name: {} for name in parameters}
    for key, entry in saved.items():
        name, kind = key.split("|")
        by_weight[name][kind] = entry
    holders, weights = state_holders(trainer.optimizer), saved_weights(checkpoint)
    for name, parameter in parameters.items():
        if not parameter.stop_gradient and holders.get(parameter.name, layout.sharding_rank) == layout.sharding_rank:
            found = by_weight[name]
            _load_states(trainer, parameter, found, weights.get(name), f"'{name}' of {checkpoint}")


def _load_states(
    trainer: Any, parameter: paddle.Tensor, found: dict[str, TensorEntry], weight: TensorEntry | None, what: str
) -> None:
    """Copies the states of one weight.

    Args:
        found: by their kinds.
        weight: as the checkpoint has it.
        what: the weight, for messages.
    """
    adamw, part = adamw_of(trainer.optimizer), slice_of(parameter, trainer.layout.sharding_rank)
    make_states(adamw, parameter)
    states = states_of(adamw, parameter)
    # A run of another precision (`allow_changed_recipe`) resumes from the same float32 numbers:
    # run now     saved with a master   what is restored
    #   half        yes                   the master from the master
    #   half        no (float32 run)      the master from the weight itself
    #   float32     yes (half run)        the weight from the master
    #   float32     no                    nothing: the weight is exact
    if MASTER in states and MASTER not in found and weight is not None:
        found = {**found, MASTER: weight}
    elif MASTER in found and MASTER not in states:
        states[MASTER] = parameter if part is None else part.tensor
    for kind, entry in found.items():
        if kind not in states:
            raise UserError(
                f"{what} has the optimiser's state '{kind}', which this run does not keep; "
                "resume with the same dtype and fp16_opt_level"
            )
        shape = (1,) if kind in FACTORS else whole_shape(parameter)
        if entry.shape != shape:
            raise UserError(f"{kind} of {what} is {list(entry.shape)}, the run's is {list(shape)}; copy the file again")
        if kind in FACTORS:
            _copy(entry, states[kind], None, f"{kind} of {what}")
        else:
            _copy(own_part(entry, part_of(parameter)), states[kind], part, f"{kind} of {what}")


def _copy(entry: TensorEntry, target: paddle.Tensor, part: Slice | None, name: str) -> None:
    """Copies a tensor of a file, or this process's part of one, or a slice of it.

    Args:
        part: the slice that `target` is of the tensor; None where it is the whole.
    """
    if part is not None:
        entry = flat_slice(entry, part.start, part.stop, int(part.tensor.shape[0]))
    copy_into(target, finite(entry, name))
