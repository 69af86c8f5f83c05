"""What must hold between a run's keys, the size of its data and the number of its processes.

Rules between keys alone are in `config/rules.py`; these need the data, and are checked before anything is written.
"""

from __future__ import annotations

import os
from pathlib import Path

from paddlemix.checkpoints.convert.declared_files import xtuner_faults
from paddlemix.checkpoints.layouts.xtuner_layout import is_xtuner
from paddlemix.config.schema import RunConfig
from paddlemix.errors import UserError
from paddlemix.log import logger
from paddlemix.models.configuration import LlavaConfig
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.trainer.resuming.best_checkpoint import best_metric
from paddlemix.trainer.run_data import steps_per_epoch


def started_processes() -> int:
    """Processes of the run as `paddle.distributed.launch` sets it, 1 when started alone."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))


def check_task(config: RunConfig) -> None:
    """Refuses a run that neither trains nor evaluates, or that cannot tell which checkpoint is the best.

    Raises:
        UserError: nothing is asked for, or `metric_for_best_model` is not measured.
    """
    if not config.do_train and config.resolved_evaluation_strategy == "no":
        raise UserError(
            "there is nothing to do: do_train is false and no evaluation is asked for; set do_train to true"
        )
    best_metric(config)  # only for its error


def check_flat_buffers(config: RunConfig, device: str) -> None:
    """Refuses the flat buffers for parameters and gradients that a file of PaddleMIX may ask for.

    PaddleNLP makes them by `coalesce_tensor`, which the Ascend plugin has in float16, float32, float64 and int32 alone,
    and updates them as one weight, which has one rate and one decay.

    Args:
        device: as paddle names it.

    Raises:
        UserError: the run asks for them.
    """
    if not config.flatten_param_grads:
        return
    if not device.startswith("npu"):
        raise UserError(f"flatten_param_grads true is for npu alone, this run computes on {device}; leave it out")
    raise UserError(
        "flatten_param_grads true is not supported: the NPU plugin has no coalesce_tensor in bfloat16, and a flat "
        "buffer has one decay and one rate for all weights, biases and norms among them; leave it out"
    )


def check_steps(config: RunConfig, rows: int, processes: int) -> None:
    """Refuses a run whose data does not fill a step, or that is too short for its schedule.

    Args:
        rows: of the training set, packed ones where the run packs.

    Raises:
        UserError: a step needs more rows than there are, no step would be made, or the warm-up is as long as the run.
    """
    # The sampler would fill a step by repeating rows, which is never what is meant.
    size, passes = config.per_device_train_batch_size, config.gradient_accumulation_steps
    step = size * passes * processes
    if step > rows:
        raise UserError(
            f"a step needs {step} rows (per_device_train_batch_size {size} x gradient_accumulation_steps {passes} x "
            f"{processes} processes), but the training data has {rows}; lower one of them or add data"
        )
    in_epoch = steps_per_epoch(config, rows, processes)
    total = config.max_steps if config.max_steps > 0 else int(in_epoch * config.num_train_epochs)
    counted = f"{total} ({rows} rows / {step} per step = {in_epoch} per epoch, x {config.num_train_epochs:g} epochs)"
    if total < 1:
        raise UserError(f"num_train_epochs {config.num_train_epochs:g}: the run's steps are {counted}; raise it")
    _check_warmup(config, total, counted)
    # PaddleNLP evaluates every logging_steps where eval_steps is not set.
    every = config.eval_steps or config.logging_steps
    if config.resolved_evaluation_strategy == "steps" and every > total:
        logger.warning("eval_steps %d is above the run's %d steps: nothing is evaluated before the end", every, total)


def _check_warmup(config: RunConfig, total: int, counted: str) -> None:
    if config.warmup_steps < total:
        return
    if config.max_steps > 0:  # a recipe that is tried for a few steps
        logger.warning(
            "warmup_steps %d exceeds the run's %d steps: the rate never stops rising", config.warmup_steps, total
        )
        return
    raise UserError(
        f"warmup_steps {config.warmup_steps}: the run's steps are {counted}, so the rate would never reach "
        "learning_rate; lower warmup_steps, set warmup_ratio (e.g. 0.03) instead, or raise num_train_epochs"
    )


def warn_of_xtuner(config: RunConfig, processor: LlavaProcessor, sizes: LlavaConfig) -> None:
    """Warns before the training if its result could not be converted back to XTuner, from where its template or model
    comes."""
    is_xtuners = processor.template.name.startswith("xtuner_") or is_xtuner(Path(str(config.model_name_or_path)))
    if not is_xtuners or processor.template.captions or sizes.vision is None:
        return
    faults = xtuner_faults(sizes, processor.to_dict())
    if faults:
        logger.warning("the result cannot be converted --to xtuner: its form has no place for %s", "; ".join(faults))
