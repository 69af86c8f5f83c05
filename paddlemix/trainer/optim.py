"""Optimiser, schedule and gradient norm: a rate per part, no decay on biases and norms, one norm over everything.

Rates of parts are set as a factor on each parameter and not as parameter groups, because paddle clips every group by
its own norm.  Paddle's clip computes the norm and throws it away; ours keeps it for the reports.  For float32 gradients
the arithmetic is the same, operation by operation, and so are the bits; squares of narrower ones are summed in float32
too, because a sum above 65504 is infinite in float16.

Source of the schedules: transformers' optimization.py (linear, cosine, constant, polynomial with warm-up).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import paddle
from paddle import nn
from paddle.nn.clip import _squared_l2_norm

from paddlemix.config.schema import RunConfig
from paddlemix.peft.settings import MAGNITUDE
from paddlemix.trainer.trainable import part_of

Pairs = list[tuple[paddle.Tensor, paddle.Tensor | None]]  # (parameter, gradient), as paddle passes them to a clip


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
    model: nn.Layer, config: RunConfig, schedule: paddle.optimizer.lr.LRScheduler, is_sharded: bool = False
) -> paddle.optimizer.Optimizer:
    """AdamW over the parameters that train.

    Args:
        schedule: the learning rate of each step.
        is_sharded: several processes share the optimiser's states; `sharding` in a run of one process does nothing.
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
        apply_decay_param_fun=lambda name: name not in without_decay,
        grad_clip=gradient_clip(config.max_grad_norm, is_sharded=is_sharded),
        multi_precision=keeps_master_weights(config),
    )
    # A sharded optimiser makes the states of its own share, later.
    if paddle.get_device() == "cpu" and not is_sharded:
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


class MeasuredNorm(nn.ClipGradByGlobalNorm):
    """Clips and keeps the norm before clipping.

    The optimiser calls it with the gradients that it is about to use: summed over micro-batches and processes, and free
    of the loss scale.

    Args:
        limit: longest gradient, > 0; None measures and clips nothing.

    Attributes:
        check: called with the norm before any weight changes, None where no weight has a gradient; returns it as a
            number, and may raise.
    """

    def __init__(self, limit: float | None) -> None:
        # Paddle's class wants a limit; without clipping it is never used.
        super().__init__(limit or 1.0)
        self._clips = limit is not None
        self._norm: paddle.Tensor | float | None = None
        self._ahead: paddle.Tensor | None = None
        self.check: Callable[[paddle.Tensor | None], float | None] | None = None

    def take(self) -> float | None:
        """The norm of the last step, once; None where the optimiser made none since, as on a float16 overflow."""
        norm, self._norm = self._norm, None
        return None if norm is None else float(norm)

    @paddle.no_grad()
    def measure(self, gradients: list[paddle.Tensor]) -> paddle.Tensor | None:
        """float32 scalar, the norm over some gradients; None where there are none."""
        if not gradients:
            return None
        # Squares of float16 overflow above 255.
        wide = (part if part.dtype == paddle.float32 else part.astype("float32") for part in gradients)
        squares = [_squared_l2_norm(gradient) for gradient in wide]
        return paddle.sqrt(paddle.stack(squares).sum())

    def use(self, norm: paddle.Tensor, value: float) -> None:
        """Takes the norm of the gradients that the optimiser is about to use, which is then not measured again.

        Args:
            norm: float32 scalar.
            value: the same number.
        """
        self._ahead, self._norm = norm, value

    @paddle.no_grad()
    def _dygraph_clip(self, params_grads: Pairs) -> Pairs:
        gradients = [gradient for _, gradient in params_grads if gradient is not None]
        # With a float16 scaler the norm was measured already, together with the overflow.
        norm, self._ahead = self._ahead, None
        if norm is None:
            norm = self.measure(gradients)
            self._norm = norm if self.check is None else self.check(norm)
        if self._clips and norm is not None:
            # Paddle's formula, limit / max(norm, limit), so that the bits are Paddle's; no branch, so nothing is waited
            # for.
            limit = paddle.full([1], self.clip_norm, dtype="float32")
            factor = limit / paddle.maximum(norm, limit)
            for gradient in gradients:
                gradient.multiply_(factor.astype(gradient.dtype))
        return params_grads


def gradient_clip(limit: float, is_sharded: bool) -> Any:
    """What an optimiser gets as `grad_clip`.

    Args:
        limit: longest gradient; 0 clips nothing.
        is_sharded: no process has all gradients: Fleet then puts its own clipping in place of Paddle's, and nothing is
            measured.

    Returns:
        A clip, or None.
    """
    if is_sharded:
        return nn.ClipGradByGlobalNorm(limit) if limit > 0 else None
    return MeasuredNorm(limit if limit > 0 else None)
