"""The reader of declared files: what may be in one, and one clear error for everything else."""

from __future__ import annotations

from typing import Any

import pytest

from paddlemix.declared import Keys, choice, either, flag, integer, items, number, take, text
from paddlemix.errors import UserError

KEYS = Keys(
    read={
        "layers": integer(1, 1000),
        "eps": number(0, 1),
        "act": choice("gelu", "silu"),
        "tied": flag,
        "mean": items(number(-10, 10), 3, 3),
        "ends": either(integer(0, 99), items(integer(0, 99))),
        "name": text,
    },
    refused={"mlp_bias": choice(False)},
    harmless={"torch_dtype"},
)


def test_null_is_absent_and_every_value_is_checked() -> None:
    values = {"layers": 4.0, "eps": 1e-5, "act": None, "tied": False, "mean": [0, 0.5, 1], "ends": [1, 2], "name": "ü"}
    found = take({**values, "mlp_bias": False, "torch_dtype": "x"}, KEYS, "config.json")
    assert found == {"layers": 4, "eps": 1e-5, "tied": False, "mean": [0, 0.5, 1], "ends": [1, 2], "name": "ü"}
    assert isinstance(found["layers"], int)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layers", "40", 'layers is "40" (text); allowed: a whole number from 1 to 1,000'),
        ("layers", [40], "layers is [40] (a list); allowed"),
        ("layers", 10**9, "layers is 1000000000; allowed"),
        ("layers", 1.5, "layers is 1.5; allowed"),
        ("layers", True, "layers is true; allowed"),
        ("layers", float("inf"), "layers is Infinity; allowed"),
        ("layers", {"a": "b" * 100}, "layers is {"),
        ("eps", float("nan"), "eps is NaN; allowed: a number from 0 to 1"),
        ("eps", 10**400, "eps is 1000"),
        ("act", "relu", 'act is "relu" (text); allowed: "gelu", "silu"'),
        ("act", ["gelu"], "act is ["),
        ("tied", 1, "tied is 1; allowed: true or false"),
        ("mean", [0, 1], "mean is [0, 1] (a list); allowed: a list of 3, each a number from -10 to 10"),
        ("mean", [0, 1, "2"], "mean is ["),
        ("ends", [1, 200], "ends is [1, 200] (a list); allowed: a whole number from 0 to 99, or a list of 0 or more"),
        ("name", "\ud800", 'name is "\\ud800" (text)'),
        ("mlp_bias", True, "mlp_bias is true; supported: false"),
        ("mlp_bias", 0, "mlp_bias is 0; supported: false"),
    ],
)
def test_a_value_of_another_kind_is_one_line(key: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        take({key: value}, KEYS, "m/config.json")
    assert str(error.value).startswith(f"m/config.json: {message}")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_all_faults_come_together() -> None:
    with pytest.raises(UserError, match=r"layers is 0; .*; tied is 0; .*; mlp_bias is true"):
        take({"layers": 0, "tied": 0, "mlp_bias": True}, KEYS, "config.json")
    with pytest.raises(UserError, match=r"config.json: text_config is \[\] \(a list\), expected an object"):
        take([], KEYS, "config.json: text_config")


def test_unknown_keys_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        assert take({"layers": 1, "qk_norm": True, "left_out": None}, KEYS, "unknown/config.json") == {"layers": 1}
    assert [record.getMessage() for record in caplog.records] == [
        'unknown/config.json: unknown keys are not used: "qk_norm"; if they change what the model computes, its '
        "numbers will differ"
    ]
