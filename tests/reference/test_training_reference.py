"""Whole runs against transformers and PEFT from the same weights, on the same batches in the same order.

Run by `make reference`.  Ours go the way of a user's run, from the recipe's keys to the files of the result.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.training_cases import (
    CASES,
    MAX_LOSS_GAP,
    MAX_WEIGHT_GAP,
    Case,
    build_start,
    load_golden,
    run_ours,
    sampled,
)
from tests.tiny_world import weights

pytest.importorskip("torch", reason="needs the reference environment: make reference")
pytest.importorskip("peft")
pytestmark = pytest.mark.reference


@pytest.fixture(scope="module", params=[False, True], ids=["v1_5", "v1_6"])
def start(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_start(tmp_path_factory.mktemp("start"), request.param)
