"""Whole runs against transformers and PEFT from the same weights, on the same batches in the same order.

Run by `make reference`.  Ours go the way of a user's run, from the recipe's keys to the files of the result.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.training_cases import CASES, MAX_LOSS_GAP, MAX_WEIGHT_GAP, Case, build_start, run_ours, start_weights

pytest.importorskip("torch", reason="needs the reference environment: make reference")
pytest.importorskip("peft")
pytestmark = pytest.mark.reference


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Any resolution or not -> where its runs start from."""
    return {kind: build_start(tmp_path_factory.mktemp("start"), kind) for kind in (False, True)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_loss_and_every_final_weight(case: Case, starts: dict[bool, Path], tmp_path: Path) -> None:
    from tests.reference.training_reference import run_reference

    start = starts[case.any_resolution]
    losses, ours = run_ours(case, start, tmp_path / "ours")
    wanted, theirs = run_reference(case, start, tmp_path / "theirs")
    np.testing.assert_allclose(losses, wanted, rtol=MAX_LOSS_GAP)
    assert wanted[-1] < wanted[0] - 0.3  # it learned: equal losses say something
    before = start_weights(case, start)
    assert ours.keys() == theirs.keys() == before.keys()
    for name, weight in theirs.items():
        np.testing.assert_allclose(ours[name], weight, rtol=0, atol=MAX_WEIGHT_GAP, err_msg=name)
    moved = {name for name, weight in ours.items() if np.abs(weight - before[name]).max() > 10 * MAX_WEIGHT_GAP}
    assert moved == {name for name in before if _trains(case, name)}


def _trains(case: Case, name: str) -> bool:
    """Whether a case's recipe trains a weight, and it has a gradient."""
    if name.startswith("vision_tower."):  # a key's bias shifts all scores of a query alike: no gradient
        return case.trains_tower and not name.endswith("k_proj.bias")
    return not case.lora or name.startswith("projector.") or name.endswith((".lora_A", ".lora_B"))
