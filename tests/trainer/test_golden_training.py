"""Whole runs against the curves that torch, transformers, PEFT and LLaVA's own model gave (`golden/training`).

The same comparison with the reference itself is in `tests/reference/test_training_reference.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training_cases import (
    CASES,
    GOLDEN_TRAINING,
    MAX_LOSS_GAP,
    MAX_WEIGHT_GAP,
    STEPS,
    Case,
    build_start,
    data_digest,
    run_ours,
    start_weights,
    summary,
)


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Any resolution or not -> where its runs start from."""
    return {kind: build_start(tmp_path_factory.mktemp("start"), kind) for kind in (False, True)}


def golden(case: Case) -> dict[str, Any]:
    return json.loads((GOLDEN_TRAINING / f"{case.name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("modality", [False, True], ids=["mixed", "modality"])
@pytest.mark.parametrize("any_resolution", [False, True], ids=["v1_5", "v1_6"])
def test_the_samples_are_encoded_as_they_were(any_resolution: bool, modality: bool, starts: dict[bool, Path]) -> None:
    """Where this fails, the curves below have to."""
    cases = [case for case in CASES if (case.any_resolution, case.modality) == (any_resolution, modality)]
    found = data_digest(cases[0], starts[any_resolution])
    assert {golden(case)["data_sha256"] for case in cases} == {found}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_run_equals_the_reference_step_by_step(case: Case, starts: dict[bool, Path], tmp_path: Path) -> None:
    start, wanted = starts[case.any_resolution], golden(case)
    losses, weights = run_ours(case, start, tmp_path)
    np.testing.assert_allclose(losses, wanted["losses"], rtol=MAX_LOSS_GAP)
    before = start_weights(case, start)
    for name, weight in weights.items():
        if name not in wanted["weights"]:
            np.testing.assert_array_equal(weight, before[name], err_msg=name)
            continue
        found, expected = summary(weight), wanted["weights"][name]
        assert found["shape"] == expected["shape"], name
        np.testing.assert_allclose(found["values"], expected["values"], rtol=0, atol=MAX_WEIGHT_GAP, err_msg=name)
        assert found["norm"] == pytest.approx(expected["norm"], rel=MAX_WEIGHT_GAP, abs=MAX_WEIGHT_GAP), name


def test_the_curves_differ_where_they_should() -> None:
    """Else a run of another case would pass too."""
    curves = {case.name: np.array(golden(case)["losses"]) for case in CASES}
    assert all(curve.shape == (STEPS,) for curve in curves.values())
    for model in ("v1_5", "v1_6"):
        for method in ("full", "lora"):  # how a step is split over passes changes nothing
            np.testing.assert_allclose(curves[f"{model}_{method}_1"], curves[f"{model}_{method}_2"], rtol=MAX_LOSS_GAP)
    apart = ("v1_5_full_2", "v1_5_full_2_micro_batch", "v1_5_lora_2", "v1_6_full_2", "v1_6_lora_2")
    for number, first in enumerate(apart):
        for second in apart[number + 1 :]:
            assert np.abs(curves[first] - curves[second]).max() > 1000 * MAX_LOSS_GAP, (first, second)


def test_no_golden_curve_is_left_over() -> None:
    assert {path.stem for path in GOLDEN_TRAINING.glob("*.json")} == {case.name for case in CASES}
