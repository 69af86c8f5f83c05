"""Checkpoints of a run: complete or absent, enough to go on bit for bit, and themselves usable as models.

    checkpoint-N/  the model's or adapter's own files
                   optimizer.safetensors   moments and master weights under our parameter names
                   training_state.json     step, schedule, loss scale, the run's configuration
                   trainer_state.json      PaddleNLP's progress record
                   checksums.json          size and digest of all of these, compared before a run goes on
                   inputs.safetensors      what the data files and pictures hold, see `input_identity`

Nothing is pickled.  Random numbers need no state: those of a step depend on seed and step alone.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from paddlemix.checkpoints.adapters.adapter import ADAPTER_WEIGHTS
from paddlemix.checkpoints.files.directories import atomic_directory, remove_directory, writing
from paddlemix.checkpoints.files.finite import NotFiniteError, all_finite, finite
from paddlemix.checkpoints.files.tensors import TensorEntry, converted
from paddlemix.checkpoints.files.weight_files import (
    read_json,
    read_safetensors,
    read_weights,
    write_json,
    write_safetensors,
)
from paddlemix.checkpoints.pretrained import copy_into, tensor_entry
from paddlemix.config.schema import RunConfig
from paddlemix.errors import UserError, did_you_mean
from paddlemix.log import logger
from paddlemix.trainer.resuming.checkpoint_check import (
    OPTIMIZER_FILE,
    PROGRESS_FILE,
    STATE_FILE,
    checkpoint_step,
    write_checksums,
)
from paddlemix.trainer.resuming.same_recipe import recipe_values

ANSWER_METRICS = ("exact_match", "rouge_l")  # measured with eval_with_do_generation
METRICS = ("loss", "token_accuracy", *ANSWER_METRICS)  # that tell the best checkpoint; reported as eval_loss, ...
_MASTER = "_fp32_master_0"  # what paddle adds to a weight's name for its float32 copy
_SCALARS = re.compile(r"(.+)_(beta[12]_pow_acc|moment[12]|moment2_max)_0")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return [path for path in checkpoint_folders(output_dir) if (path / STATE_FILE).is_file()]


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """Every folder named `checkpoint-N`, complete or not, and every link of that name, oldest first."""
    if not output_dir.is_dir():
        return []
    found = {step: path for path in output_dir.iterdir() if (step := checkpoint_step(path)) is not None}
    return [found[step] for step in sorted(found) if found[step].is_dir() or found[step].is_symlink()]


def is_in(checkpoint: Path, output_dir: Path) -> bool:
    """Whether a checkpoint is in a run's folder: itself, or as a link to where it was moved."""
    places = (checkpoint.resolve().parent, Path(os.path.abspath(checkpoint)).parent.resolve())
    return output_dir.resolve() in places


def completed_steps(checkpoint: Path) -> int:
    """Optimiser steps that a checkpoint has behind it.

    Raises:
        MissingFileError, UserError: the checkpoint is not complete.
    """
    return int(read_json(checkpoint / STATE_FILE)["global_step"])


def saved_recipe(checkpoint: Path) -> dict[str, Any]:
    """The keys and values that decided what the checkpoint's run computed; {} where it did not say."""
    return dict(read_json(checkpoint / STATE_FILE).get("recipe", {}))


def save_checkpoint(trainer: Any, metrics: dict[str, float] | None) -> Path:
    """Writes `checkpoint-N` of the current step and removes those beyond `save_total_limit`.

    Raises:
        UserError: it cannot be written; earlier checkpoints are untouched.
    """
    output_dir = Path(trainer.config.output_dir)
    target = output_dir / f"checkpoint-{trainer.state.global_step}"
    _note_best(trainer, metrics, target)
    if trainer.args.should_save:
        with what_is_left(target.name, trainer):
            if target.exists() and target.name not in trainer.own_checkpoints:
                _set_aside(target)
            with atomic_directory(target) as temporary:
                _write_checkpoint(trainer, temporary, target)
        best = best_checkpoint(trainer)
        kept = {target, *([] if best is None else [best])}
        _rotate([output_dir / name for name in trainer.own_checkpoints], trainer.config.save_total_limit, kept)
    return target


def _write_checkpoint(trainer: Any, directory: Path, target: Path) -> None:
    trainer.own_checkpoints = [name for name in trainer.own_checkpoints if name != target.name] + [target.name]
    trainer.write_model(directory, target)
    if not trainer.config.ignore_save_lr_and_optim:
        write_safetensors(directory / OPTIMIZER_FILE, all_finite(_optimizer_entries(trainer)))
    trainer.state.save_to_json(str(directory / PROGRESS_FILE))
    if trainer.input_identity is not None:
        trainer.input_identity.write(directory)
    write_json(directory / STATE_FILE, _state_values(trainer))
    write_checksums(directory)


@contextlib.contextmanager
def what_is_left(name: str, trainer: Any) -> Iterator[None]:
    """Says of an error while something of a run is saved what was not, after which step, and what there is instead.

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
    """What is to be said of a tensor that the run's own steps made NaN or infinite, and what there is instead."""
    config = trainer.config
    return (
        f"{tensor} holds {found} after step {trainer.state.global_step}, made so by a step since the last checkpoint; "
        f"lower learning_rate ({config.learning_rate:g}), raise adam_epsilon ({config.adam_epsilon:g}) or set "
        f"max_grad_norm above 0 ({config.max_grad_norm:g}). {_earlier(Path(config.output_dir), 'whole')}"
    )


def _earlier(output_dir: Path, state: str = "untouched") -> str:
    checkpoints = list_checkpoints(output_dir)
    if not checkpoints:
        return "There is no earlier checkpoint: the run has to begin anew"
    return f"{checkpoints[-1].name} is {state}: the same command goes on from there"


def _state_values(trainer: Any) -> dict[str, Any]:
    scaler = trainer.scaler.state_dict() if trainer.do_grad_scaling else {}
    return {
        "global_step": trainer.state.global_step,
        "schedule": trainer.lr_scheduler.state_dict(),
        "scaler": {key: np.asarray(value).tolist() for key, value in scaler.items()},
        "tokens_seen": trainer.tokens_seen,
        "evaluations": trainer.evaluations,
        "own_checkpoints": trainer.own_checkpoints,
        "recipe": recipe_values(trainer.config),
    }


def best_metric(config: RunConfig) -> str:
    """The metric that tells the best checkpoint, e.g. "eval_loss".

    Raises:
        UserError: `metric_for_best_model` is none that the run's evaluations measure.
    """
    name = config.metric_for_best_model or "loss"
    if name.removeprefix("eval_") in ANSWER_METRICS and not config.eval_with_do_generation:
        raise UserError(f"metric_for_best_model='{name}' is only measured with eval_with_do_generation true; set it")
    if name.removeprefix("eval_") not in METRICS:
        raise UserError(
            f"metric_for_best_model='{name}' is not one of {', '.join(METRICS)}{did_you_mean(name, METRICS)}"
        )
    return f"eval_{name.removeprefix('eval_')}"


def is_better(config: RunConfig, value: float, best: float, threshold: float = 0.0) -> bool:
    """Whether a value of the best-model metric beats another by more than `threshold`."""
    greater = config.greater_is_better
    if greater is None:
        greater = not best_metric(config).endswith("loss")
    return value - best > threshold if greater else best - value > threshold


def best_checkpoint(trainer: Any) -> Path | None:
    """Where the best checkpoint is now; None while there is none.

    The state remembers a path.  The run's folder may have been renamed since, or be named from another working
    directory: what the run itself wrote is found in its folder by name.
    """
    recorded = trainer.state.best_model_checkpoint
    if not recorded:
        return None
    here = Path(trainer.config.output_dir) / Path(recorded).name
    return here if here.name in trainer.own_checkpoints else Path(recorded)


def _note_best(trainer: Any, metrics: dict[str, float] | None, target: Path) -> None:
    if not metrics:
        return
    key, best = best_metric(trainer.config), trainer.state.best_metric
    if not math.isfinite(metrics[key]):  # nothing would ever be better than NaN
        return
    if best is None or is_better(trainer.config, metrics[key], best):
        trainer.state.best_metric, trainer.state.best_model_checkpoint = metrics[key], str(target)


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
        own: those that the run wrote, oldest first; others in the folder are not its to remove.
    """
    checkpoints = [path for path in own if (path / STATE_FILE).is_file()]
    surplus = len(checkpoints) - limit if limit else 0
    for path in checkpoints:
        if surplus > 0 and path not in kept:
            remove_directory(path)
            surplus -= 1


def _optimizer_entries(trainer: Any) -> dict[str, TensorEntry]:
    """The optimiser's tensors as `<our parameter name>|<kind>`; paddle's own names differ from process to process."""
    ours = {parameter.name: name for name, parameter in trainer.model.model.named_parameters()}
    state = trainer.optimizer.state_dict()
    entries = {}
    for key, value in state.items():
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
    if not trainer.config.ignore_load_lr_and_optim:
        _load_optimizer(trainer, checkpoint)
        trainer.lr_scheduler.set_state_dict(values["schedule"])
        trainer.lr_scheduler.step(trainer.lr_scheduler.last_epoch)  # the rate is this run's, also where it was changed
        if trainer.do_grad_scaling and values["scaler"]:
            trainer.scaler.load_state_dict({key: np.asarray(item) for key, item in values["scaler"].items()})
    logger.info("resumed from %s at step %d", checkpoint, values["global_step"])
    return int(values["global_step"])


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
            if completed_steps(path) <= values["global_step"] and saved_recipe(path) == values.get("recipe", {}):
                found.append(path.name)
    return found


def load_weights(model: paddle.nn.Layer, checkpoint: Path) -> None:
    """Copies the weights of a checkpoint of this run into the model.

    Raises:
        UserError: a trained weight is not in the checkpoint.
    """
    entries = _saved_weights(checkpoint)
    for name, parameter in model.named_parameters():
        if name in entries:
            if tuple(parameter.shape) != entries[name].shape:
                raise UserError(
                    f"{checkpoint}: {name} is {list(entries[name].shape)}, the run's is {list(parameter.shape)}; "
                    "resume needs the settings of the run that saved it"
                )
            copy_into(parameter, finite(entries[name], f"'{name}' of {checkpoint}"))
        elif not parameter.stop_gradient:
            raise UserError(
                f"{checkpoint} has no weight '{name}', which trains in this run; resume needs the same settings"
            )


def _saved_weights(checkpoint: Path) -> Mapping[str, TensorEntry]:
    is_adapter = (checkpoint / ADAPTER_WEIGHTS).is_file()
    return read_safetensors(checkpoint / ADAPTER_WEIGHTS) if is_adapter else read_weights(checkpoint)


def _load_optimizer(trainer: Any, checkpoint: Path) -> None:
    path = checkpoint / OPTIMIZER_FILE
    saved = read_safetensors(path)
    parameters = dict(trainer.model.model.named_parameters())
    unknown = sorted({key.split("|")[0] for key in saved} - parameters.keys())
    if unknown:
        raise UserError(f"{path} holds the optimiser's state of '{unknown[0]}', which this run does not have")
    masters = _master_weights(saved, parameters, checkpoint)
    state: dict[str, Any] = {
        **dict(_optimizer_state(saved, parameters)),
        **dict(_start_state(saved, parameters, trainer.config)),
    }
    if masters:
        state["master_weights"] = masters
    state["LR_Scheduler"] = trainer.lr_scheduler.state_dict()
    trainer.optimizer.set_state_dict(state)


def _master_weights(
    saved: dict[str, TensorEntry], parameters: dict[str, Any], checkpoint: Path
) -> dict[str, paddle.Tensor]:
    """The float32 copies of weights that are held in half precision, by paddle's names.

    A run of another precision (`allow_changed_recipe`) goes on from the same float32 numbers: its copies are the
    weights that a float32 run saved, its float32 weights the copies that a run in half precision saved.
    """
    weights, masters = _saved_weights(checkpoint), {}
    for name in sorted({key.split("|")[0] for key in saved}):
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


def _optimizer_state(saved: dict[str, TensorEntry], parameters: dict[str, Any]) -> Iterator[tuple[str, paddle.Tensor]]:
    for key, entry in saved.items():
        name, kind = key.split("|")
        if kind != "master_weight":
            master = _MASTER if _has_master(parameters[name]) else ""
            yield f"{parameters[name].name}{master}_{kind}_0", paddle.to_tensor(np.ascontiguousarray(entry.read()))


def _start_state(
    saved: dict[str, TensorEntry], parameters: dict[str, Any], config: RunConfig
) -> Iterator[tuple[str, paddle.Tensor]]:
    """State of the weights that had no gradient yet, as of a projector when every sample so far was text.

    Paddle makes it at the first gradient, but not any more in an optimiser that was given a state.
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
