"""PaddleNLP's view of a run, as paddlemix.trainer.build_trainer takes it: what our Trainer does itself is off there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paddlemix.config.load import load_config
from paddlemix.trainer.processes import begin_processes


def arguments(output_dir: Path, **values: Any) -> Any:
    given = {"model_name_or_path": "model", "output_dir": str(output_dir), "recompute": True, **values}
    config = load_config(None, [f"{key}={json.dumps(item)}" for key, item in given.items()])
    return begin_processes(config, "cpu")[0]


def test_what_our_trainer_does_itself_is_off(tmp_path: Path) -> None:
    found = arguments(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-3"), seed=7, max_steps=5)
    off = ("remove_unused_columns", "load_best_model_at_end", "unified_checkpoint", "recompute")
    assert [getattr(found, name) for name in (*off, "ignore_load_lr_and_optim")] == [False] * 5
    assert found.resume_from_checkpoint is None and found.release_grads is True
    assert (found.seed, found.max_steps, found.logging_dir) == (7, 5, str(tmp_path / "logs"))
    assert arguments(tmp_path, logging_dir=str(tmp_path / "own")).logging_dir == str(tmp_path / "own")
