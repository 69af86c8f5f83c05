"""Checkpoints: whole or absent, how many stay, which is best, and what may go on from them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.checkpoints.files import joint_writing
from paddlemix.checkpoints.files.weight_files import read_safetensors
from paddlemix.checkpoints.load import load_pretrained
from paddlemix.datasets.order import EpochBatchSampler
from paddlemix.errors import UserError
from paddlemix.trainer import build_trainer, optim
from paddlemix.trainer import trainer as trainer_module
from paddlemix.trainer.evaluator import Evaluator
from paddlemix.trainer.recipe import run_recipe
from paddlemix.trainer.resuming.checkpoint_folders import list_checkpoints
from tests.tiny_world import LORA, World, changed, reports, weights

EVERY = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
WITH_EVALUATION = {**EVERY, "evaluation_strategy": "steps", "eval_steps": 2}


def steps(output_dir: Path) -> list[int]:
    return [int(path.name.partition("-")[2]) for path in list_checkpoints(output_dir)]


@pytest.fixture
def scripted_losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Evaluation losses that the next evaluations report, taken from the front."""
    losses: list[float] = []
    monkeypatch.setattr(Evaluator, "sums", lambda self, dataset, share: (losses.pop(0), 5 - len(losses), 1))
    return losses


def test_only_the_newest_stay_under_a_limit(world: World, tmp_path: Path) -> None:
    run_recipe(world.config(tmp_path, save_total_limit=2, **EVERY))
    assert steps(tmp_path) == [4, 6]


def test_without_a_limit_all_stay(world: World, tmp_path: Path) -> None:
    run_recipe(world.config(tmp_path, save_total_limit=0, **EVERY))
    assert steps(tmp_path) == [2, 4, 6]


def test_the_best_stays_and_ends_the_run(world: World, tmp_path: Path, scripted_losses: list[float]) -> None:
    scripted_losses += [1.0, 2.0, 3.0]
    config = world.config(tmp_path, save_total_limit=1, load_best_model_at_end=True, **WITH_EVALUATION)
    run_recipe(config)
    assert steps(tmp_path) == [2, 6]
    assert not changed(weights(tmp_path / "checkpoint-2"), weights(tmp_path))
    assert changed(weights(tmp_path / "checkpoint-6"), weights(tmp_path))


def test_the_best_stays_where_the_run_s_folder_was_moved(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scripted_losses: list[float]
) -> None:
    """Its place is remembered as a path, which is then another one: the folder's new name, or as seen from here."""
    scripted_losses += [1.0, 2.0, 3.0]
    values = {**WITH_EVALUATION, "save_total_limit": 1, "load_best_model_at_end": True}
    run_recipe(world.config(tmp_path / "before", **{**values, "max_steps": 4}))
    (tmp_path / "before").rename(tmp_path / "after")
    monkeypatch.chdir(tmp_path)
    run_recipe(world.config(Path("after"), **values))
    assert steps(tmp_path / "after") == [2, 6]
    assert not changed(weights(tmp_path / "after" / "checkpoint-2"), weights(tmp_path / "after"))
    run_recipe(world.config(tmp_path / "after", **values))  # nothing is left to train
    assert not changed(weights(tmp_path / "after" / "checkpoint-2"), weights(tmp_path / "after"))


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ({"metric_for_best_model": "token_accuracy"}, 6),  # grows while the loss does
        ({"metric_for_best_model": "eval_loss"}, 2),
        ({"metric_for_best_model": "eval_loss", "greater_is_better": True}, 6),
    ],
)
def test_what_best_means(
    world: World, tmp_path: Path, scripted_losses: list[float], values: dict[str, Any], best: int
) -> None:
    scripted_losses += [1.0, 2.0, 3.0]
    run_recipe(world.config(tmp_path, load_best_model_at_end=True, **values, **WITH_EVALUATION))
    assert not changed(weights(tmp_path / f"checkpoint-{best}"), weights(tmp_path))


def test_the_best_of_an_adapter_ends_the_run(world: World, tmp_path: Path, scripted_losses: list[float]) -> None:
    scripted_losses += [2.0, 1.0, 3.0]
    run_recipe(world.config(tmp_path, load_best_model_at_end=True, learning_rate=0.02, **LORA, **WITH_EVALUATION))
    assert not changed(weights(tmp_path / "checkpoint-4"), weights(tmp_path))
    assert changed(weights(tmp_path / "checkpoint-6"), weights(tmp_path))


def test_a_metric_that_is_not_measured_is_refused_at_once(world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'acuracy' is not one of loss, token_accuracy, .*mean 'token_accuracy'"):
        run_recipe(world.config(tmp_path / "out", metric_for_best_model="acuracy", **WITH_EVALUATION))
    assert not (tmp_path / "out").exists()


def break_second_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full when the second checkpoint's optimiser is written, behind its weights."""
    calls: Iterator[int] = iter(range(100))
    write = joint_writing.write_safetensors

    def fail(*arguments: Any, **named: Any) -> None:
        if next(calls) == 3:  # weights, optimiser, weights, optimiser
            raise OSError(28, "No space left on device")
        write(*arguments, **named)

    monkeypatch.setattr(joint_writing, "write_safetensors", fail)


def test_a_failed_write_leaves_the_earlier_checkpoint_alone(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_second_write(monkeypatch)
    with pytest.raises(UserError, match="cannot write .*checkpoint-4': No space left on device; free space"):
        run_recipe(world.config(tmp_path, save_total_limit=1, **EVERY))
    assert steps(tmp_path) == [2]
    kept = ["checkpoint-2", "metrics.jsonl", "run_config.json", "started_by.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    assert load_pretrained(tmp_path / "checkpoint-2").processor is not None
    monkeypatch.undo()
    run_recipe(world.config(tmp_path, **EVERY))  # and the run goes on from there
    assert steps(tmp_path) == [2, 4, 6]


@pytest.mark.parametrize("values", [{}, LORA], ids=["full", "lora"])
def test_a_checkpoint_is_itself_a_model(world: World, tmp_path: Path, values: dict[str, Any]) -> None:
    run_recipe(world.config(tmp_path, **EVERY, **values))
    loaded = load_pretrained(tmp_path / "checkpoint-6")
    assert loaded.processor is not None and loaded.processor.template.name == "vicuna_v1"
    assert (loaded.adapter is not None) is bool(values)
    assert not changed(weights(tmp_path / "checkpoint-6"), weights(tmp_path))
    moved = shutil.move(tmp_path / "checkpoint-6", tmp_path / "elsewhere")
    assert not changed(weights(Path(moved)), weights(tmp_path))


def test_nothing_in_a_checkpoint_is_pickled(world: World, tmp_path: Path) -> None:
    run_recipe(world.config(tmp_path, **EVERY))
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert {"optimizer.safetensors", "training_state.json", "trainer_state.json"} <= names
    assert {Path(name).suffix for name in names} <= {".safetensors", ".json", ".model"}
    state = json.loads((tmp_path / "checkpoint-2" / "training_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == 2


def test_a_finished_run_that_is_started_again_makes_no_further_step(world: World, tmp_path: Path) -> None:
    config = world.config(tmp_path, **EVERY)
    run_recipe(config)
    before, lines = weights(tmp_path), reports(tmp_path)
    assert run_recipe(config) == {"steps": 6}
    assert not changed(before, weights(tmp_path))
    assert reports(tmp_path) == lines
    assert steps(tmp_path) == [2, 4, 6]


def test_going_on_reports_the_loss_of_its_own_steps(world: World, tmp_path: Path) -> None:
    run_recipe(world.config(tmp_path, **{**EVERY, "max_steps": 4}))
    results = run_recipe(world.config(tmp_path, **EVERY))
    own = [loss for step, loss in reports(tmp_path).items() if step > 4]
    assert results["steps"] == 6 and len(own) == 2
    assert results["train_loss"] == pytest.approx(np.mean(own), rel=1e-5)


def test_going_on_from_an_earlier_one_keeps_the_new_one(world: World, tmp_path: Path) -> None:
    run_recipe(world.config(tmp_path, **EVERY))
    shutil.rmtree(tmp_path / "checkpoint-4")
    changes = {"resume_from_checkpoint": str(tmp_path / "checkpoint-2"), "max_steps": 4, "save_total_limit": 1}
    run_recipe(world.config(tmp_path, **{**EVERY, **changes}))
    assert 4 in steps(tmp_path)


def test_only_what_the_run_wrote_is_removed_or_replaced(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_recipe(world.config(tmp_path, **EVERY))
    shutil.copytree(tmp_path / "checkpoint-6", tmp_path / "checkpoint-900")
    later = weights(tmp_path / "checkpoint-6")
    changes = {"resume_from_checkpoint": str(tmp_path / "checkpoint-4"), "save_total_limit": 1, "learning_rate": 0.002}
    run_recipe(world.config(tmp_path, **{**EVERY, **changes, "allow_changed_recipe": True}))
    assert steps(tmp_path) == [6, 900]  # 2 and 4 are of the run that went on from 4
    assert changed(later, weights(tmp_path / "checkpoint-6"))
    assert not changed(later, weights(tmp_path / "checkpoint-6.earlier"))
    assert "checkpoint-6 is not of this run; it is kept as checkpoint-6.earlier" in caplog.text


def test_a_second_run_in_the_folder_ends_at_once_and_harms_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, met, save = world.config(tmp_path / "twice", **EVERY), list[str](), trainer_module.save_checkpoint

    def start_again(*arguments: Any) -> Path:
        with pytest.raises(UserError, match=f"output_dir '{tmp_path}/twice' is being written by process {os.getpid()}"):
            run_recipe(config)
        met.append("")
        return save(*arguments)

    run_recipe(world.config(tmp_path / "once", **EVERY))
    monkeypatch.setattr(trainer_module, "save_checkpoint", start_again)
    run_recipe(config)
    assert len(met) == 3
    assert not changed(weights(tmp_path / "once"), weights(tmp_path / "twice"))
    assert reports(tmp_path / "once") == reports(tmp_path / "twice")
    assert sorted(path.name for path in (tmp_path / "once").iterdir()) == sorted(
        path.name for path in (tmp_path / "twice").iterdir()
    )


def test_overwriting_begins_from_another_runs_checkpoint_in_a_cleared_folder(world: World, tmp_path: Path) -> None:
    run_recipe(world.config(tmp_path / "run", **{**EVERY, "max_steps": 4}))
    run_recipe(world.config(tmp_path / "other", **EVERY, learning_rate=0.005))
    (tmp_path / "other" / "notes.txt").write_text("mine", encoding="utf-8")
    given = {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-4"), "overwrite_output_dir": True}
    run_recipe(world.config(tmp_path / "other", **EVERY, **given))
    assert steps(tmp_path / "other") == [6] and (tmp_path / "other" / "notes.txt").exists()
    assert sorted(reports(tmp_path / "other")) == [5, 6]


def test_a_checkpoint_of_an_earlier_version_counts_those_of_its_recipe(world: World, tmp_path: Path) -> None:
    run_recipe(world.config(tmp_path, **{**EVERY, "max_steps": 4}))
    for step in (2, 4):
        path = tmp_path / f"checkpoint-{step}" / "training_state.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        del values["own_checkpoints"]
        path.write_text(json.dumps(values), encoding="utf-8")
        path.with_name("checksums.json").unlink()
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-1")
    path = tmp_path / "checkpoint-1" / "training_state.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"seed": 3', '"seed": 4'), encoding="utf-8")
    run_recipe(world.config(tmp_path, save_total_limit=1, **EVERY))
    assert steps(tmp_path) == [1, 6]


def test_other_settings_cannot_go_on(world: World, tmp_path: Path) -> None:
    run_recipe(world.config(tmp_path, **{**EVERY, "max_steps": 2}))
    with pytest.raises(UserError, match="other settings: lora False -> True"):
        run_recipe(world.config(tmp_path, **EVERY, lora=True))
    with pytest.raises(UserError, match="has no weight '.*lora_A', which trains in this run"):
        run_recipe(world.config(tmp_path, **EVERY, lora=True, allow_changed_recipe=True))


@pytest.mark.parametrize("at_once", [True, False])
def test_a_part_that_had_no_gradient_yet_goes_on_as_if_nothing_had_happened(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    """Texts without a blank image reach no projector: at the stop its optimiser state is zero, or as if it were where
    states are made when they are needed."""
    monkeypatch.setattr(build_trainer, "trains_visual_parts", lambda model: False)
    if not at_once:
        monkeypatch.setattr(optim, "_make_states", lambda *_: None)
    records = json.loads((world.data / "train.json").read_text(encoding="utf-8"))
    order = list(EpochBatchSampler(4, 1, 1, 3))
    mixed: list[Any] = [None] * 4
    for place, rows in enumerate(order):
        mixed[rows[0]] = records[3] if place < 2 else records[0]
    data = tmp_path / "mixed.json"
    data.write_text(json.dumps(mixed), encoding="utf-8")
    values = {**EVERY, "dataset": {"train": [{"data_files": str(data)}]}, "per_device_train_batch_size": 1, "seed": 3}
    run_recipe(world.config(tmp_path / "whole", **{**values, "max_steps": 4}))
    run_recipe(world.config(tmp_path / "parts", **{**values, "max_steps": 2}))
    saved = read_safetensors(tmp_path / "parts" / "checkpoint-2" / "optimizer.safetensors")
    moments = [value for name, value in saved.items() if name.startswith("projector.") and "moment" in name]
    assert moments and not any(np.any(value.read()) for value in moments)
    run_recipe(world.config(tmp_path / "parts", **{**values, "max_steps": 4}))
    assert not changed(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_an_adapter_of_another_rank_cannot_go_on(world: World, tmp_path: Path) -> None:
    run_recipe(world.config(tmp_path, **{**EVERY, "max_steps": 2}, **LORA))
    with pytest.raises(UserError, match=r"lora_A is \[32, 4\], the run's is \[32, 2\]; resuming needs the settings"):
        run_recipe(world.config(tmp_path, **EVERY, **{**LORA, "lora_rank": 2}, allow_changed_recipe=True))


@pytest.mark.parametrize("key", ["ignore_data_skip", "ignore_load_lr_and_optim"])
def test_going_on_without_a_part_of_the_state(world: World, tmp_path: Path, key: str) -> None:
    values = {**EVERY, "per_device_train_batch_size": 3}  # four steps an epoch: step 2 is in its middle
    run_recipe(world.config(tmp_path, **{**values, "max_steps": 2}))
    assert run_recipe(world.config(tmp_path, **values, **{key: True}))["steps"] == 6
    assert sorted(reports(tmp_path)) == [1, 2, 3, 4, 5, 6]


def test_a_run_without_loss_scaling_goes_on_from_one_with_it(world: World, tmp_path: Path) -> None:
    run_recipe(world.config(tmp_path, **{**EVERY, "max_steps": 2}))
    path = tmp_path / "checkpoint-2" / "training_state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**state, "scaler": {"scale": [1024.0], "incr_count": 1}}), encoding="utf-8")
    path.with_name("checksums.json").unlink()
    assert run_recipe(world.config(tmp_path, **{**EVERY, "max_steps": 3}))["steps"] == 3


def test_a_checkpoint_without_optimiser_says_so(world: World, tmp_path: Path) -> None:
    run_recipe(world.config(tmp_path, **{**EVERY, "max_steps": 2}, ignore_save_lr_and_optim=True))
    assert not (tmp_path / "checkpoint-2" / "optimizer.safetensors").exists()
    with pytest.raises(
        UserError, match="has no optimizer.safetensors, .*; set ignore_load_lr_and_optim true to resume"
    ):
        run_recipe(world.config(tmp_path, **EVERY, model_name_or_path="/absent"))  # said before anything is loaded
    assert run_recipe(world.config(tmp_path, **EVERY, ignore_load_lr_and_optim=True))["steps"] == 6
