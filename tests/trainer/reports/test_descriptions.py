"""Names for people."""

from __future__ import annotations

from typing import Any

import pytest

from paddlemix import __version__
from paddlemix.peft.settings import LoRAConfig
from paddlemix.trainer.reports.descriptions import describe_adapter, describe_environment


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "LoRA adapter (rank 8, alpha 16)"),
        ({"use_dora": True, "rslora": True}, "DoRA adapter (rank 8, alpha 16, rank-stabilised)"),
        ({"pissa": True}, "PiSSA adapter (rank 8, alpha 16)"),
    ],
)
def test_adapters(values: dict[str, Any], said: str) -> None:
    assert describe_adapter(LoRAConfig(r=8, lora_alpha=16, modules=("a",), **values)) == said


def test_machine_and_software() -> None:
    found = dict(describe_environment("cpu", 2))
    assert found["device"].startswith("cpu (") and found["device"].endswith("threads), 2 processes")
    assert found["paddlemix"] == __version__ and {"paddlenlp", "python", "system"} <= found.keys()
    assert dict(describe_environment("npu:3", 1))["device"] == "npu:3 (npu), 1 process"
