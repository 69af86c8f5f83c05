"""What a step made is looked at before it is kept: no NaN is saved, and the error says what there is instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.checkpoints.files.tensors import TensorEntry
from paddlemix.checkpoints.files.weight_files import read_safetensors
from paddlemix.errors import UserError
from paddlemix.trainer import trainer as trainer_module
from paddlemix.trainer.evaluator import Evaluator
from paddlemix.trainer.recipe import run_recipe
from paddlemix.trainer.resuming.checkpoint_folders import list_checkpoints
from tests.tiny_world import LORA, World, changed, weights

EVERY = {"save_strategy": "steps", "save_steps": 2}


def all_finite(output_dir: Path) -> bool:
    """Whether every number below a directory is one."""
    files = [read_safetensors(path) for path in output_dir.rglob("*.safetensors")]
    return all(np.isfinite(np.asarray(entry.read())).all() for file in files for entry in file.values())


def rate_at(monkeypatch: pytest.MonkeyPatch, step: int, rate: float = 1e39) -> None:
    """One step's rate is beyond float32."""
    build = trainer_module.build_schedule

    def build_schedule(*arguments: Any) -> Any:
        schedule = build(*arguments)
        get_lr = schedule.get_lr
        schedule.get_lr = lambda: rate if schedule.last_epoch == step - 1 else get_lr()
        return schedule

    monkeypatch.setattr(trainer_module, "build_schedule", build_schedule)


@pytest.mark.parametrize("values", [{"save_steps": 1}, {"save_steps": 1, **LORA}, {}], ids=["full", "lora", "later"])
def test_no_epsilon(world: World, tmp_path: Path, values: dict[str, Any]) -> None:
    """Adam divides zero by zero wherever a gradient was zero, as in the rows of tokens that did not occur."""
    what = "checkpoint-1 was not saved: '" if values else r"the loss of step 2 is nan, because the weight '"
    said = (
        rf"{what}\S+' holds (NaN|NaN or infinity) after step 1, made so by a step since the last checkpoint; .*raise "
        r"adam_epsilon \(0\).* There is no earlier checkpoint"
    )
    with pytest.raises(UserError, match=said):
        run_recipe(world.config(tmp_path, adam_epsilon=0, **{**EVERY, **values}))
    assert not list_checkpoints(tmp_path) and all_finite(tmp_path)


def test_a_rate_without_measure_in_the_last_step(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rate_at(monkeypatch, 4)
    said = r"the result was not saved: '\S+' holds (NaN|infinity) after step 4, .*checkpoint-2 is whole: the same"
    run = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    run_recipe(world.config(tmp_path, **run))
    before = weights(tmp_path)
    with pytest.raises(UserError, match=said):
        run_recipe(world.config(tmp_path, max_steps=4))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"] and all_finite(tmp_path)
    assert not changed(before, weights(tmp_path))  # an earlier result stays as it was
    monkeypatch.undo()
    assert run_recipe(world.config(tmp_path, max_steps=4))["steps"] == 4  # the same command goes on from there


def test_the_next_step_s_error_blames_the_weight(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rate_at(monkeypatch, 3)
    said = r"the loss of step 4 is \S+, because the weight '\S+' holds NaN or infinity after step 3.*-2 is whole"
    with pytest.raises(UserError, match=said):
        run_recipe(world.config(tmp_path, max_steps=6, **EVERY))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"] and all_finite(tmp_path)


def test_a_moment_that_is_no_number_is_no_checkpoint(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paddlemix.trainer.resuming import saving

    original = saving.optimizer_entries

    def entries(trainer: Any) -> Any:
        found = original(trainer)
        key = next(key for key in found if key.endswith("|moment2"))
        values = np.array(found[key].read())
        values.flat[-1] = np.inf
        return {**found, key: TensorEntry(found[key].dtype, found[key].shape, lambda: values)}

    monkeypatch.setattr(saving, "optimizer_entries", entries)
    with pytest.raises(UserError, match=r"checkpoint-2 was not saved: '\S+\|moment2' holds infinity after step 2"):
        run_recipe(world.config(tmp_path, **EVERY))


def test_an_evaluation_that_is_no_number_is_not_the_best(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = [float("nan"), 2.0, 3.0]
    monkeypatch.setattr(Evaluator, "sums", lambda self, dataset, share: (losses.pop(0), 1.0, 1))
    evaluation = {"evaluation_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    run_recipe(world.config(tmp_path, max_steps=6, **EVERY, **evaluation))
    assert not changed(weights(tmp_path / "checkpoint-4"), weights(tmp_path))
