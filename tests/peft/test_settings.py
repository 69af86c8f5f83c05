"""An adapter's settings: patterns, scaling, files."""

from __future__ import annotations

import json
from typing import Any

import pytest

from paddlemix.errors import UserError
from paddlemix.peft.settings import LoRAConfig, is_adapter_weight, is_start_value, lora_config_from_dict

Q_PROJ = "vision_tower.layers.1.self_attn.q_proj"


def test_settings_survive_a_file() -> None:
    config = LoRAConfig(r=4, lora_alpha=32, lora_dropout=0.1, modules=("lm_head", "projector.0"))
    assert lora_config_from_dict(config.to_dict()) == config
    assert config.to_dict()["scaling"] == config.scaling == 8.0
    other = LoRAConfig(
        r=4,
        rslora=True,
        use_dora=True,
        bias="all",
        rank_pattern={"vision_tower": 2},
        alpha_pattern={Q_PROJ: 0.5},
        modules=(Q_PROJ,),
    )
    assert lora_config_from_dict(json.loads(json.dumps(other.to_dict()))) == other
    pissa = LoRAConfig(r=4, pissa=True)
    assert lora_config_from_dict(pissa.to_dict()) == pissa


def test_a_file_of_before_is_a_plain_adapter() -> None:
    values = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "modules": ["lm_head"], "scaling": 2.0}
    assert lora_config_from_dict(values) == LoRAConfig(r=2, lora_alpha=4, modules=("lm_head",))


def test_the_longest_name_that_fits_counts() -> None:
    config = LoRAConfig(
        r=8,
        lora_alpha=16,
        rank_pattern={"vision_tower": 4, "vision_tower.layers.1": 2, "vision_tower.layers.1.self": 1},
        alpha_pattern={Q_PROJ: 1},
    )
    assert [config.rank_of(name) for name in ("lm_head", "vision_tower.layers.11.mlp.fc1", Q_PROJ)] == [8, 4, 2]
    assert [config.scaling_of(name) for name in ("lm_head", "vision_tower.layers.0.mlp.fc1", Q_PROJ)] == [2, 4, 0.5]
    assert LoRAConfig(r=4, lora_alpha=6, rslora=True).scaling == 3.0
    assert LoRAConfig(r=1, rslora=True, rank_pattern={"a": 16}, lora_alpha=2).scaling_of("a.b") == 0.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 2, "lora_alpha": 4}, "have no key 'modules'"),
        ({"r": "two", "lora_alpha": 4, "modules": []}, "cannot be understood: .*two"),
        ({"r": 2, "lora_alpha": None, "modules": []}, "have no key 'lora_alpha'"),
        ({"r": "2", "lora_alpha": 4, "modules": []}, r'cannot be understood: r is "2" .text.; allowed: a whole number'),
        ({"r": 2.5, "lora_alpha": 4, "modules": []}, "cannot be understood: r is 2.5"),
        ({"r": 10**9, "lora_alpha": 4, "modules": []}, "cannot be understood: r is 1000000000"),
        ({"r": 2, "lora_alpha": float("nan"), "modules": []}, "cannot be understood: lora_alpha is NaN"),
        ({"r": 2, "lora_alpha": 4, "modules": [3]}, "cannot be understood: modules is .3."),
        ({"r": 2, "lora_alpha": 4, "modules": "q_proj"}, "cannot be understood: modules is .q_proj."),
        ({"r": 2, "lora_alpha": 4, "modules": [], "use_dora": "no"}, "cannot be understood: use_dora is .no."),
        ({"r": 2, "lora_alpha": 4, "modules": [], "rank_pattern": {"a": "4"}}, "cannot be understood: rank_pattern"),
        ({"r": 2, "lora_alpha": 4, "modules": 3}, "cannot be understood"),
        ({"r": 2, "lora_alpha": 4, "modules": [], "rank_pattern": 3}, "cannot be understood"),
        (
            {"r": 2, "lora_alpha": 4, "modules": [], "bias": "lora"},
            "lora_bias 'lora' is not one of none, lora_only, all",
        ),
        ({"r": 2, "lora_alpha": 4, "modules": [], "use_dora": True, "pissa": True}, "use_dora and pissa are both true"),
        ({"r": 2, "lora_alpha": 4, "modules": [], "rank_pattern": {"lm_head": 0}}, "lora_rank 0 of lm_head must be"),
        ({"r": 0, "lora_alpha": 4, "modules": []}, "lora_rank 0 must be at least 1"),
        (
            {"r": 2, "lora_alpha": 4, "lora_dropout": 1, "modules": []},
            "lora_dropout 1 must be at least 0 and below 1",
        ),
    ],
)
def test_settings_that_are_none(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        lora_config_from_dict(values)


def test_names_of_an_adapters_weights() -> None:
    own = ["lm_head.lora_A", "a.lora_B", "a.lora_magnitude_vector", "a.lora_A_start", "a.lora_B_start"]
    assert all(is_adapter_weight(name) for name in own)
    assert [name for name in own if is_start_value(name)] == own[3:]
    assert not any(is_adapter_weight(name) for name in ("lm_head.weight", "lora_A.weight", "a.bias"))
