"""The keys of adapter kinds and what must hold between them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from paddlemix.config.load import ConfigError, load_config
from paddlemix.config.schema import RunConfig


def load(**values: Any) -> RunConfig:
    given = {"model_name_or_path": "model", "output_dir": "out", **values}
    return load_config(None, [f"{key}={json.dumps(value)}" for key, value in given.items()])


def test_defaults_are_a_plain_adapter() -> None:
    config = load(lora=True)
    assert (config.lora_bias, config.rslora, config.use_dora, config.pissa) == ("none", False, False, False)
    assert (config.lora_plus_scale, config.vision_lora_rank, config.vision_lora_alpha) == (1.0, None, None)


@pytest.mark.parametrize(
    "values",
    [
        {"lora": True, "use_dora": True, "rslora": True, "lora_plus_scale": 16, "lora_bias": "all"},
        {"lora": True, "pissa": True, "rslora": True},
        {"vision_tower": "lora", "vision_lora_rank": 64, "vision_lora_alpha": 16},
        {"lora_path": "adapter", "use_dora": True, "lora_plus_scale": 2},
        {"rslora": False, "use_dora": False, "pissa": False, "lora_plus_scale": 1.0, "lora_bias": "none"},
        {"lora": True, "lora_target_modules": "all-linear"},
        {"lora": True, "lora_target_modules": [".*q_proj"]},
    ],
)
def test_combinations_that_are_allowed(values: dict[str, Any]) -> None:
    assert load(**values).warnings == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora": True, "use_dora": True, "pissa": True}, "use_dora and pissa are both true; choose one"),
        ({"use_dora": True}, "use_dora needs lora true, or a part with policy lora; add that or remove use_dora"),
        ({"lora_plus_scale": 4}, "lora_plus_scale needs lora true, or a part with policy lora"),
        (
            {"lora": True, "vision_tower": "full", "vision_lora_rank": 8},
            'vision_lora_rank contradicts vision_tower "full"',
        ),
        (
            {"lora": True, "vision_tower": "frozen", "vision_lora_alpha": 8},
            "set it to lora or remove vision_lora_alpha",
        ),
        ({"lora": True, "lora_bias": "lora"}, "lora_bias='lora' is not one of none, lora_only, all"),
        ({"lora": True, "lora_plus_scale": -1}, "lora_plus_scale: -1.0 is below 0"),
        ({"lora": True, "vision_lora_rank": 0}, "vision_lora_rank: 0 is below 1"),
    ],
)
def test_combinations_that_are_not(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(**values)
    (fault,) = raised.value.faults
    assert message in fault


def test_quick_lora_is_accepted_without_effect() -> None:
    (warning,) = load(lora=True, use_quick_lora=True).warnings
    assert "use_quick_lora has no effect here. The faster order of an adapter's products is always chosen." in warning
