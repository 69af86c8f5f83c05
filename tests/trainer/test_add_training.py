"""What makes a model trainable: a run and its dry run decide alike, and each way calls what adds the layers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from paddlemix.config.load import load_config
from paddlemix.config.schema import RunConfig
from paddlemix.dry_run.model import describe_model
from paddlemix.errors import UserError
from paddlemix.peft.lora import LoRAConfig, add_lora
from paddlemix.trainer.add_training import add_training
from tests.tiny_models import tiny_llava, tiny_model

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "projector alone": {"language_model": "frozen"},
    "LoRA": {"lora": True, "lora_rank": 2},
    "DoRA with biases": {"lora": True, "lora_rank": 2, "use_dora": True, "vision_tower": "lora", "lora_bias": "all"},
    "PiSSA": {"lora": True, "lora_rank": 2, "pissa": True},
}


def settings(**values: Any) -> RunConfig:
    given = {"model_name_or_path": "model", "output_dir": "out", **values}
    return load_config(None, [f"{key}={json.dumps(value)}" for key, value in given.items()])


def refuse(*_: Any) -> Any:
    raise AssertionError("not this way")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_and_its_dry_run_train_the_same(kind: str) -> None:
    config, model, begun = settings(**KINDS[kind]), tiny_model(), []

    def begin(adapter: LoRAConfig) -> None:
        begun.append(adapter)
        add_lora(model, adapter)

    adapter = add_training(model, config, refuse, begin)
    assert begun == ([] if adapter is None else [adapter]) and (adapter is not None) == bool(config.lora)
    run = {name: not parameter.stop_gradient for name, parameter in model.named_parameters()}
    dry = {weight.name: weight.trained for weight in describe_model(config, tiny_llava(), None).weights}
    assert dry == run and any(run.values()) and not all(run.values())


def test_nothing_is_added_where_the_plan_is_wrong() -> None:
    with pytest.raises(UserError, match="matches no linear layer"):
        add_training(tiny_model(), settings(lora=True, lora_target_modules=["none"]), refuse, refuse)
