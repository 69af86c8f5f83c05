"""What a micro-batch costs in copies to the device, and when they are made."""

from __future__ import annotations

from typing import Any

import pytest

from tests.npu.cases import FINETUNE
from tests.npu.conftest import Bench
from tests.npu.test_numbers import probe


@pytest.fixture(scope="module")
def found(plugin: Any) -> dict[str, Any]:
    return probe(plugin, "copied_batches", "made_ahead")


_WHOLE = ["input_ids", "loss_index", "loss_targets", "position_ids"]


@pytest.mark.parametrize(
    ("kind", "copies", "names"),
    [
        ("text", 1, _WHOLE),
        ("image", 2, [*_WHOLE, "merge_index", "pixel_values"]),
        ("packed", 2, [*_WHOLE, "merge_index", "pixel_values", "segment_ids"]),
    ],
)
def test_a_batch_is_one_copy_and_its_pixels_another(
    found: dict[str, Any], kind: str, copies: int, names: list[str]
) -> None:
    assert found["copied_batches"][kind] == {"copies": copies, "wrong": [], "names": sorted(names)}


def test_a_batch_without_anything_to_learn_is_whole_too(found: dict[str, Any]) -> None:
    assert found["copied_batches"]["unsupervised"]["wrong"] == []


def test_the_next_batch_is_made_while_one_is_in_use(found: dict[str, Any]) -> None:
    assert found["made_ahead"] == {"order": [[0, 2], [1, 3], [2, 3]], "before an error": [0, 1, 2, -1]}


def test_a_micro_batch_costs_two_copies(bench: Bench) -> None:
    """Its own, made before it begins; the optimiser has some more for each step."""
    per_step = []
    for count in (1, 2):
        name = f"copies {count}"
        bench.train("bare", name, {"gradient_accumulation_steps": count}, FINETUNE)
        report = bench.outcome("bare", name).report
        assert [step["h2d_calls"] for step in report["micro_steps"][1:]] == [0] * (len(report["micro_steps"]) - 1)
        per_step.append(max(step["h2d_calls"] for step in report["steps"][1:]))
    assert per_step[1] - per_step[0] <= 2


def test_a_weight_is_turned_on_the_device(plugin: Any) -> None:
    """It comes as it lies in its file, in the model's type, and a number that is none is told all the same."""
    found = probe(plugin, "turned_weights")["turned_weights"]
    assert found == {"float32": [0, True], "bfloat16": [0, True], "host transposes": 0, "NaN": "infinity"}
