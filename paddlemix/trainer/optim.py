"""Optimiser and schedule: learning rate per part, no decay on biases and norms, one gradient norm over everything.

Rates of parts are set as a factor on each parameter and not as parameter groups, because paddle clips every group by
its own norm.  Source of the schedules: transformers' optimization.py (linear, cosine, constant, polynomial with
warm-up).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import paddle
from paddle import nn

from paddlemix.config.schema import RunConfig
from paddlemix.peft.settings import MAGNITUDE
from paddlemix.trainer.gradient_norm import gradient_clip
from paddlemix.trainer.trainable import part_of


def set_learning_rates(model: nn.Layer, config: RunConfig) -> None:
    """Gives each trained parameter its part's rate, as a factor on `learning_rate`; lora_B its multiple of it.

    Source of the multiple: Hayou et al. 2024, "LoRA+".
    """
    rates = {"projector": config.mm_projector_lr, "vision_tower": config.mm_vision_tower_lr}
    for name, parameter in model.named_parameters():
        rate = rates.get(part_of(name))
        factor = 1.0 if rate is None or not config.learning_rate else rate / config.learning_rate
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


def build_optimizer(
    model: nn.Layer, config: RunConfig, schedule: paddle.optimizer.lr.LRScheduler, is_sharded: bool = False
) -> paddle.optimizer.Optimizer:
    """AdamW over the parameters that train.

    Args:
        schedule: gives the learning rate of each step.
        is_sharded: several processes share the optimiser's states; `sharding` in a run of one process does nothing.
    """
    without_decay = undecayed(model)
    low_precision = config.fp16_opt_level == "O2" and (config.bf16 or config.fp16)
    parameters = [parameter for parameter in model.parameters() if not parameter.stop_gradient]
    optimizer = paddle.optimizer.AdamW(
        learning_rate=schedule,
        beta1=config.adam_beta1,
        beta2=config.adam_beta2,
        epsilon=config.adam_epsilon,
        parameters=parameters,
        weight_decay=config.weight_decay,
        apply_decay_param_fun=lambda name: name not in without_decay,
        grad_clip=gradient_clip(config.max_grad_norm, is_sharded=is_sharded),
        multi_precision=low_precision,
    )
    if paddle.get_device() == "cpu" and not is_sharded:
        _make_states(optimizer, parameters)
    return optimizer


def _make_states(optimizer: paddle.optimizer.Optimizer, parameters: list[paddle.Tensor]) -> None:
    """Makes the optimiser's states now, beside the weights: behind the first step's activations they would cut the
    CPU's heap into pieces that activations no longer fit."""
    optimizer._create_accumulators(paddle.static.default_main_program().global_block(), parameters)


def build_schedule(config: RunConfig, total_steps: int) -> paddle.optimizer.lr.LambdaDecay:
    """Learning rate of every step.

    Args:
        total_steps: optimiser steps of the run, >= 1.

    Returns:
        A schedule that rises linearly from 0 over the warm-up and never falls below `min_learning_rate` afterwards.
    """
    warmup = config.warmup_steps or math.ceil(total_steps * config.warmup_ratio)
    shape = _shape(config)
    floor = config.min_learning_rate / config.learning_rate if config.learning_rate else 0.0

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        return max(shape((step - warmup) / max(1, total_steps - warmup)), floor)

    return paddle.optimizer.lr.LambdaDecay(config.learning_rate, factor)


def _shape(config: RunConfig) -> Callable[[float], float]:
    """Share of the highest rate after a share 0..1 of the steps behind the warm-up."""
    end = config.lr_end / config.learning_rate if config.learning_rate else 0.0
    shapes: dict[str, Callable[[float], float]] = {
        "constant": lambda done: 1.0,
        "constant_with_warmup": lambda done: 1.0,
        "linear": lambda done: max(0.0, 1.0 - done),
        "cosine": lambda done: max(0.0, 0.5 * (1.0 + math.cos(math.pi * config.num_cycles * 2.0 * done))),
        "polynomial": lambda done: (1.0 - end) * (1.0 - min(done, 1.0)) ** config.power + end,
    }
    return shapes[config.lr_scheduler_type]
