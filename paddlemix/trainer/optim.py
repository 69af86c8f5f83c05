"""Optimiser and schedule: a rate per part, no decay on biases and norms, one clip over everything.

Rates of parts are set as a factor on each parameter and not as parameter groups, because paddle clips every group by
its own norm.

Source of the schedules: transformers' optimization.py (linear, cosine, constant, polynomial with warm-up).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import paddle
from paddle import nn

from paddlemix.config.schema import RunConfig
from paddlemix.parallel.layout import ALONE, Layout
from paddlemix.parallel.shares import SLICE
from paddlemix.peft.settings import MAGNITUDE
from paddlemix.trainer.steps.clipping import MeasuredNorm
from paddlemix.trainer.steps.step_losses import StepLosses
from paddlemix.trainer.trainable import part_of


def set_learning_rates(model: nn.Layer, config: RunConfig) -> None:
    """Gives each trained parameter its part's rate, as a factor on `learning_rate`; lora_B its multiple of it.

    Source of the multiple: Hayou et al. 2024, "LoRA+".
    """
    rates = {"projector": config.mm_projector_lr, "vision_tower": config.mm_vision_tower_lr}
    for name, parameter in model.named_parameters():
        # None: the part has no rate of its own. 0 is a rate.
        rate = rates.get(part_of(name))
        factor = 1.0 if rate is None or not config.learning_rate else rate / config.learning_rate
        # LoRA+ raises the rate of B alone, on top of its part's.
        is_second = name.endswith(".lora_B")
        parameter.optimize_attr["learning_rate"] = factor * config.lora_plus_scale if is_second else factor


def undecayed(model: nn.Layer) -> set[str]:
    """Paddle's names of the parameters without weight decay: biases, norms and DoRA's lengths.

    Source: transformers' `Trainer.get_decay_parameter_names`, which decays the newline and class vectors.
    """
    return {
        parameter.name
        for name, parameter in model.named_parameters()
        if name.endswith((".bias", f".{MAGNITUDE}")) or "norm" in name
    }


def keeps_master_weights(config: RunConfig) -> bool:
    """Whether trained weights are held in half precision, with a float32 copy that the optimiser changes."""
    return config.fp16_opt_level == "O2" and (config.bf16 or config.fp16)


def build_optimizer(
    model: nn.Layer,
    config: RunConfig,
    schedule: paddle.optimizer.lr.LRScheduler,
    layout: Layout = ALONE,
    losses: StepLosses | None = None,
) -> paddle.optimizer.Optimizer:
    """AdamW over the parameters that train.

    Args:
        schedule: the learning rate of each step.
        layout: what the processes of the run share.
        losses: of each step, checked before weights change.
    """
    without_decay = undecayed(model)
    parameters = [parameter for parameter in model.parameters() if not parameter.stop_gradient]
    optimizer = paddle.optimizer.AdamW(
        learning_rate=schedule,
        beta1=config.adam_beta1,
        beta2=config.adam_beta2,
        epsilon=config.adam_epsilon,
        parameters=parameters,
        weight_decay=config.weight_decay,
        # Sharding stage 3 gives the optimiser this process's slice of a parameter, under a name of its own.
        apply_decay_param_fun=lambda name: name.removeprefix(SLICE) not in without_decay,
        grad_clip=MeasuredNorm(config.max_grad_norm if config.max_grad_norm > 0 else None, layout, losses),
        multi_precision=keeps_master_weights(config),
    )
    # A sharded optimiser makes the states of its own share, later.
    if paddle.get_device() == "cpu" and not layout.stage:
        _make_states(optimizer, parameters)
    return optimizer


def _make_states(optimizer: paddle.optimizer.Optimizer, parameters: list[paddle.Tensor]) -> None:
    """Makes the optimiser's states now, next to the weights.  Made after the first step's activations, they would cut
    the CPU's heap into pieces that activations no longer fit."""
    optimizer._create_accumulators(paddle.static.default_main_program().global_block(), parameters)


def build_schedule(config: RunConfig, total_steps: int) -> paddle.optimizer.lr.LambdaDecay:
    """Learning rate of every step.

    Args:
        total_steps: optimiser steps of the run, >= 1.

    Returns:
        A schedule that rises linearly from 0 over the warm-up and never falls below `min_learning_rate` afterwards.
    """
    # Rounded up, as transformers does; PaddleNLP rounds down.
    warmup = config.warmup_steps or math.ceil(total_steps * config.warmup_ratio)
    shape = _shape(config)
    floor = config.min_learning_rate / config.learning_rate if config.learning_rate else 0.0

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        return max(shape((step - warmup) / max(1, total_steps - warmup)), floor)

    return paddle.optimizer.lr.LambdaDecay(config.learning_rate, factor)


def _shape(config: RunConfig) -> Callable[[float], float]:
    """Share of the highest rate after a share 0..1 of the steps after the warm-up."""
    # Shapes are shares of the highest rate, and a part's factor comes on top.
    end = config.lr_end / config.learning_rate if config.learning_rate else 0.0
    shapes: dict[str, Callable[[float], float]] = {
        "constant": lambda done: 1.0,
        "constant_with_warmup": lambda done: 1.0,
        "linear": lambda done: max(0.0, 1.0 - done),
        "cosine": lambda done: max(0.0, 0.5 * (1.0 + math.cos(math.pi * config.num_cycles * 2.0 * done))),
        "polynomial": lambda done: (1.0 - end) * (1.0 - min(done, 1.0)) ** config.power + end,
    }
    return shapes[config.lr_scheduler_type]
