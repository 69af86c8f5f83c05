"""The optimiser's tensors under our parameter names, written to a checkpoint and read back.

Paddle's own names differ from process to process.  A key is `<our parameter name>|<kind>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from paddlemix.checkpoints.files.tensors import TensorEntry, Tensors, converted
from paddlemix.checkpoints.pretrained import copy_into, tensor_entry
from paddlemix.config.schema import RunConfig
from paddlemix.errors import UserError
from paddlemix.trainer.resuming.checkpoint_folders import optimizer_files, saved_weights

_MASTER = "_fp32_master_0"  # what paddle adds to a weight's name for its float32 copy
_SCALARS = re.compile(r"(.+)_(beta[12]_pow_acc|moment[12]|moment2_max)_0")


def optimizer_entries(trainer: Any) -> dict[str, TensorEntry]:
    """The optimiser's tensors as `<our parameter name>|<kind>`."""
    ours = {parameter.name: name for name, parameter in trainer.model.model.named_parameters()}
    state = trainer.optimizer.state_dict()
    entries = {}
    for key, value in state.items():
        # Anything else in the state (schedule, master weights) is stored elsewhere.
        match = _SCALARS.fullmatch(key)
        if match is not None and isinstance(value, paddle.Tensor):
            name, kind = match.groups()
            # With master weights paddle keys a moment by the master weight's name.
            entries[f"{ours[_parameter_name(name, ours)]}|{kind}"] = tensor_entry(value)
    for name, value in state.get("master_weights", {}).items():
        entries[f"{ours[name]}|master_weight"] = tensor_entry(value)
    return entries


def _parameter_name(name: str, known: dict[str, str]) -> str:
    return name if name in known else name.removesuffix(_MASTER)


def load_optimizer(trainer: Any, checkpoint: Path) -> None:
    saved = optimizer_files(checkpoint)
    parameters = dict(trainer.model.model.named_parameters())
    # State for a weight that is not here means another model or another set of trained parts.
    unknown = sorted({key.split("|")[0] for key in saved} - parameters.keys())
    if unknown:
        raise UserError(f"{checkpoint} holds the optimiser's state of '{unknown[0]}', which this run does not have")
    masters = _master_weights(saved, parameters, checkpoint)
    state: dict[str, Any] = {
        **dict(_optimizer_state(saved, parameters)),
        **dict(_start_state(saved, parameters, trainer.config)),
    }
    if masters:
        state["master_weights"] = masters
    # Paddle's optimiser expects its schedule in its own state too.
    state["LR_Scheduler"] = trainer.lr_scheduler.state_dict()
    trainer.optimizer.set_state_dict(state)


def _master_weights(saved: Tensors, parameters: dict[str, Any], checkpoint: Path) -> dict[str, paddle.Tensor]:
    """The float32 copies of weights that are held in half precision, by paddle's names.

    A run of another precision (`allow_changed_recipe`) resumes from the same float32 numbers: its copies are the
    weights that a float32 run saved, its float32 weights the copies that a run in half precision saved.
    """
    weights, masters = saved_weights(checkpoint), {}
    for name in sorted({key.split("|")[0] for key in saved}):
        # run now      saved with a master   -> what is restored
        #   half         yes                   -> master from the master
        #   half         no (float32 run)      -> master from the weight itself
        #   float32      yes (half run)        -> weight from the master
        #   float32      no                    -> nothing to do: the weight is exact
        parameter, entry = parameters[name], saved.get(f"{name}|master_weight")
        if _has_master(parameter):
            exact = converted(weights[name] if entry is None else entry, "F32").read()
            masters[parameter.name] = paddle.to_tensor(np.ascontiguousarray(exact))
            masters[parameter.name].name = f"{parameter.name}{_MASTER}"
        elif entry is not None:
            copy_into(parameter, entry)
    return masters


def _has_master(parameter: paddle.Tensor) -> bool:
    """Whether paddle's AdamW keeps a float32 copy of a weight, and its moments under that one's name."""
    return parameter.dtype in (paddle.float16, paddle.bfloat16)


def _optimizer_state(saved: Tensors, parameters: dict[str, Any]) -> Iterator[tuple[str, paddle.Tensor]]:
    for key, entry in saved.items():
        name, kind = key.split("|")
        if kind != "master_weight":
            master = _MASTER if _has_master(parameters[name]) else ""
            yield f"{parameters[name].name}{master}_{kind}_0", paddle.to_tensor(np.ascontiguousarray(entry.read()))


def _start_state(saved: Tensors, parameters: dict[str, Any], config: RunConfig) -> Iterator[tuple[str, paddle.Tensor]]:
    """State of the weights that had no gradient yet, as of a projector when every sample so far was text.

    Paddle makes it at the first gradient, but no longer in an optimiser that was given a state.
    """
    begun = {key.split("|")[0] for key in saved}
    for name, parameter in parameters.items():
        if name in begun or parameter.stop_gradient:
            continue
        master = _MASTER if _has_master(parameter) else ""
        for kind in ("moment1", "moment2"):
            yield f"{parameter.name}{master}_{kind}_0", paddle.zeros(parameter.shape, dtype="float32")
        for kind, beta in (("beta1", config.adam_beta1), ("beta2", config.adam_beta2)):
            yield f"{parameter.name}{master}_{kind}_pow_acc_0", paddle.full([1], beta, dtype="float32")
