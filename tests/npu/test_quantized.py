"""Quantised layers off the CPU: weights of a decoder layer made wide together, with the operators that NPU has."""

from __future__ import annotations

from typing import Any

import pytest

from paddlemix.peft.quantized_weight import KINDS
from tests.npu.test_numbers import probe
from tests.npu_double.build import STRICT

CODED = ("int8", "nf4")


@pytest.fixture(scope="module")
def found(plugin: Any) -> dict[str, Any]:
    return probe(plugin, "wide_weights", "quantized_steps", "quantized_operators", **STRICT)


@pytest.mark.parametrize("kind", CODED)
def test_wide_weights_are_those_of_the_cpu(found: dict[str, Any], kind: str) -> None:
    """Bit for bit, in one piece, in some of several layers and in some of one, with inputs that no block divides."""
    for pieces, differing in found["wide_weights"][kind].items():
        assert differing == {"float32": 0, "bfloat16": 0}, pieces


def test_one_group_is_wide_at_a_time(found: dict[str, Any]) -> None:
    assert found["wide_weights"]["held"] == [[True, False], [False, True], [False, False]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_the_same_weights_held_wide(found: dict[str, Any], kind: str) -> None:
    """Losses and the adapter's gradients in bf16, with and without recomputation."""
    for recompute in ("plain", "recomputed"):
        loss, gradient = found["quantized_steps"][kind][recompute]
        assert loss < 2e-3 and gradient < 0.02, recompute


def test_codes_cost_few_operators_of_a_step(found: dict[str, Any]) -> None:
    """Per decoder layer and step with recomputation, beyond those of LoRA on plain weights."""
    counts = found["quantized_operators"]
    assert counts["plain"] > 100
    assert {kind: counts[kind] - counts["plain"] <= 30 for kind in KINDS} == dict.fromkeys(KINDS, True), counts
