"""Learning rates over steps and parts, decay and clipping, each against a formula written here."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import paddle
import pytest

from paddlemix.config.load import load_config
from paddlemix.config.schema import RunConfig
from paddlemix.models.llava import LlavaModel
from paddlemix.peft.lora import LoRAConfig, add_lora
from paddlemix.trainer.optim import build_optimizer, build_schedule, set_learning_rates
from paddlemix.trainer.trainable import part_of
from tests.tiny_models import tiny_model


def settings(**values: Any) -> RunConfig:
    given = {"model_name_or_path": "model", "output_dir": "out", "learning_rate": 0.01, **values}
    return load_config(None, [f"{key}={json.dumps(value)}" for key, value in given.items()])


def rates(total: int, **values: Any) -> list[float]:
    """The rate of every step of a run."""
    schedule = build_schedule(settings(**values), total)
    found = []
    for _ in range(total):
        found.append(schedule.get_lr())
        schedule.step()
    return found


def one_step(config: RunConfig, gradient: float, model: LlavaModel | None = None) -> dict[str, np.ndarray]:
    """What one step adds to each weight whose gradient is the same everywhere."""
    model = model or tiny_model()
    before = {name: parameter.numpy() for name, parameter in model.named_parameters()}
    set_learning_rates(model, config)
    optimizer = build_optimizer(model, config, build_schedule(config, 10))
    for parameter in model.parameters():
        if not parameter.stop_gradient:
            (parameter.sum() * gradient).backward()
    optimizer.step()
    return {name: parameter.numpy() - before[name] for name, parameter in model.named_parameters()}


def test_the_first_step_is_as_large_as_the_rate_of_the_part() -> None:
    """AdamW's first step is the rate times the gradient's sign."""
    config = settings(
        lr_scheduler_type="constant", mm_projector_lr=0.002, mm_vision_tower_lr=0.0005, max_grad_norm=0, weight_decay=0
    )
    expected = {"projector": 0.002, "vision_tower": 0.0005, "language_model": 0.01}
    for name, step in one_step(config, gradient=3.0).items():
        np.testing.assert_allclose(step, -expected[part_of(name)], rtol=1e-3, err_msg=name)


def test_without_own_rates_every_part_has_the_same() -> None:
    for name, step in one_step(settings(lr_scheduler_type="constant", max_grad_norm=0), gradient=-1.0).items():
        np.testing.assert_allclose(step, 0.01, rtol=1e-3, err_msg=name)


def test_an_adapter_has_the_rate_of_its_part() -> None:
    model = tiny_model()
    add_lora(model, LoRAConfig(r=2, modules=("projector.0", "lm_head")))
    config = settings(lr_scheduler_type="constant", mm_projector_lr=0.002, max_grad_norm=0)
    steps = one_step(config, 1.0, model)
    np.testing.assert_allclose(steps["projector.0.lora_B"], -0.002, rtol=1e-3)
    np.testing.assert_allclose(steps["lm_head.lora_B"], -0.01, rtol=1e-3)


def test_lora_plus_multiplies_the_rate_of_the_second_matrix_alone() -> None:
    model = tiny_model()
    add_lora(model, LoRAConfig(r=2, use_dora=True, modules=("projector.0", "lm_head")))
    config = settings(
        lora=True, lora_plus_scale=4.0, lr_scheduler_type="constant", mm_projector_lr=0.002, max_grad_norm=0
    )
    wanted = {"projector.0.lora_A": 0.002, "projector.0.lora_B": 0.008, "projector.0.weight": 0.002}
    wanted |= {"lm_head.lora_A": 0.01, "lm_head.lora_B": 0.04, "lm_head.lora_magnitude_vector": 0.01}
    steps = one_step(config, 1.0, model)
    for name, rate in wanted.items():
        np.testing.assert_allclose(steps[name], -rate, rtol=2e-3, err_msg=name)


def test_biases_and_norms_do_not_decay() -> None:
    """As in transformers, where newline and class vectors do."""
    model = tiny_model()
    before = {name: parameter.numpy() for name, parameter in model.named_parameters()}
    config = settings(lr_scheduler_type="constant", weight_decay=0.1, mm_projector_lr=0.005)
    for name, step in one_step(config, 0.0, model).items():
        kept = "norm" in name or name.endswith("bias")
        rate = 0.005 if part_of(name) == "projector" else 0.01
        np.testing.assert_allclose(step, 0.0 if kept else -rate * 0.1 * before[name], atol=1e-6, err_msg=name)


def test_a_frozen_parameter_does_not_move() -> None:
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.stop_gradient = not name.startswith("projector.")
    steps = one_step(settings(weight_decay=0.1, lr_scheduler_type="constant"), 1.0, model)
    assert {name for name, step in steps.items() if step.any()} == {n for n in steps if n.startswith("projector.")}


def test_one_norm_over_all_parts_is_clipped() -> None:
    """Rates of parts must not make groups, each of which would be clipped by itself."""
    model = tiny_model()
    config = settings(max_grad_norm=1.0, mm_projector_lr=0.002)
    set_learning_rates(model, config)
    optimizer = build_optimizer(model, config, build_schedule(config, 10))
    pairs = [(parameter, paddle.ones_like(parameter)) for parameter in model.parameters()]
    clipped = optimizer._grad_clip(pairs)
    norm = math.sqrt(sum(float((gradient**2).sum()) for _, gradient in clipped))
    assert norm == pytest.approx(1.0, rel=1e-3)
    values = np.concatenate([gradient.numpy().reshape(-1) for _, gradient in clipped])
    np.testing.assert_allclose(values, values[0], rtol=1e-5)
    without_limit = build_optimizer(model, settings(max_grad_norm=0), build_schedule(config, 10))._grad_clip
    pairs = [(parameter, paddle.ones_like(parameter)) for parameter in model.parameters()]
    assert all((gradient.numpy() == 1).all() for _, gradient in without_limit(pairs))  # it only measures


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        ("constant", lambda done: 1.0),
        ("constant_with_warmup", lambda done: 1.0),
        ("linear", lambda done: 1.0 - done),
        ("cosine", lambda done: 0.5 * (1 + math.cos(math.pi * done))),
        ("polynomial", lambda done: (1 - 1e-5) * (1 - done) ** 2 + 1e-5),
    ],
)
def test_the_shape_behind_the_warm_up(kind: str, formula: Any) -> None:
    found = rates(20, lr_scheduler_type=kind, warmup_steps=4, power=2.0)
    np.testing.assert_allclose(found[:4], [0.01 * step / 4 for step in range(4)], atol=1e-12)
    np.testing.assert_allclose(found[4:], [0.01 * formula(step / 16) for step in range(16)], atol=1e-9)


def test_the_warm_up_is_rounded_up_and_steps_win() -> None:
    assert rates(10, warmup_ratio=0.03)[:2] == [0.0, 0.01]  # a share of a step is a step
    assert rates(10, warmup_ratio=0.5, warmup_steps=2, lr_scheduler_type="constant")[:3] == [0.0, 0.005, 0.01]


def test_the_floor_holds_behind_the_warm_up_only() -> None:
    found = rates(12, lr_scheduler_type="cosine", warmup_steps=2, min_learning_rate=0.004)
    assert found[0] == 0.0
    assert min(found[2:]) == pytest.approx(0.004)
    assert found[2] == pytest.approx(0.01)


def test_a_rate_of_zero_moves_nothing() -> None:
    steps = one_step(settings(learning_rate=0.0, lr_scheduler_type="constant", weight_decay=0.1), 1.0)
    assert not any(step.any() for step in steps.values())
