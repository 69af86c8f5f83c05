"""How many operators a layer costs on a card, with the plugin's fused operators and without, and what is copied.

Each call costs the host some 10 to 50 microseconds: beyond these numbers a card waits for it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import HANG, ROOT
from tests.npu_double.build import README_BLOCK, STRICT, environment

COPIES = ("h2d_calls", "d2h_calls")
# Of a layer: in a micro-batch with recomputation, or for the tokens of `TOKENS`.
FUSED = {"full": 50, "lora": 141, "lora with dropout": 246, "token": 22}
PLAIN = {"full": 169, "lora": 254, "lora with dropout": 359, "token": 43}
TOKENS = 2  # what "token" counts
TO_DEVICE = 0  # copies for a decoded token

Found = dict[str, dict[str, Counter[str]]]


@pytest.fixture(scope="module")
def budgets(plugin: Path) -> dict[str, Found]:
    """Both runs of `tests.npu.budgets`."""
    found = {}
    for name in ("fused", "plain"):
        command = [sys.executable, "-m", "tests.npu.budgets", name]
        flags = {**README_BLOCK, **STRICT}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=HANG, cwd=ROOT, env=environment(plugin, **flags)
        )
        assert done.returncode == 0, done.stderr
        runs = json.loads(done.stdout.splitlines()[-1])
        found[name] = {run: {what: Counter(item) for what, item in counts.items()} for run, counts in runs.items()}
    return found


@pytest.mark.parametrize(("way", "most"), [("fused", FUSED), ("plain", PLAIN)])
def test_a_layer_costs_no_more_operators_than(budgets: dict[str, Found], way: str, most: dict[str, int]) -> None:
    layers = {
        run: {name: n for name, n in item["layer"].items() if name not in COPIES} for run, item in budgets[way].items()
    }
    counts = {run: sum(layer.values()) / (TOKENS if run == "token" else 1) for run, layer in layers.items()}
    assert {run: count for run, count in counts.items() if not 10 <= count <= most[run]} == {}, layers
    assert ("flash_attention_npu" in layers["full"]) == ("rms_norm_npu" in layers["token"]) == (way == "fused")


@pytest.mark.parametrize("way", ["fused", "plain"])
def test_a_decoded_token_is_read_once_and_nothing_is_sent(budgets: dict[str, Found], way: str) -> None:
    token = budgets[way]["token"]["model"]
    assert (token["h2d_calls"], token["d2h_calls"]) == (TO_DEVICE * TOKENS, TOKENS)
