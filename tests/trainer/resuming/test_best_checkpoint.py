"""The best checkpoint: which metric decides, what counts as better, where it is after the folder was renamed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paddlemix.config.load import load_config
from paddlemix.config.schema import RunConfig
from paddlemix.trainer.resuming.best_checkpoint import best_checkpoint, best_metric, is_better, note_best


def settings(**values: Any) -> RunConfig:
    given = {"model_name_or_path": "model", "output_dir": "out", **values}
    return load_config(None, [f"{key}={json.dumps(value)}" for key, value in given.items()])


@pytest.mark.parametrize(
    ("values", "metric", "larger"),
    [
        ({}, "eval_loss", False),
        ({"metric_for_best_model": "token_accuracy"}, "eval_token_accuracy", True),
        ({"metric_for_best_model": "eval_loss", "greater_is_better": True}, "eval_loss", True),
        ({"metric_for_best_model": "token_accuracy", "greater_is_better": False}, "eval_token_accuracy", False),
    ],
)
def test_what_is_better(values: dict[str, Any], metric: str, larger: bool) -> None:
    config = settings(**values)
    assert best_metric(config) == metric
    assert is_better(config, 2.0, 1.0) is larger and is_better(config, 1.0, 2.0) is not larger
    assert not is_better(config, 1.0, 1.0) and not is_better(config, math.nan, 1.0)
    assert not is_better(config, 1.5 if larger else 0.5, 1.0, threshold=0.5)  # more than the threshold


def test_the_first_number_and_every_better_one_is_noted(tmp_path: Path) -> None:
    state = SimpleNamespace(best_metric=None, best_model_checkpoint=None)
    trainer = SimpleNamespace(config=settings(output_dir=str(tmp_path / "renamed")), state=state, own_checkpoints=[])
    assert best_checkpoint(trainer) is None
    for step, loss in ((1, math.nan), (2, 3.0), (3, 4.0), (4, 1.0), (5, math.inf)):
        note_best(trainer, {"eval_loss": loss}, tmp_path / "first" / f"checkpoint-{step}")
    note_best(trainer, None, tmp_path / "first" / "checkpoint-6")
    assert (state.best_metric, state.best_model_checkpoint) == (1.0, str(tmp_path / "first" / "checkpoint-4"))
    assert best_checkpoint(trainer) == tmp_path / "first" / "checkpoint-4"  # of another run: where it was
    trainer.own_checkpoints = ["checkpoint-4"]
    assert best_checkpoint(trainer) == tmp_path / "renamed" / "checkpoint-4"
