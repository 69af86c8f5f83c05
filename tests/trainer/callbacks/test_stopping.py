"""What ends a run before its time: a loss that is no number, a signal, evaluations that stop getting better."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from paddlemix.checkpoints.files.weight_files import read_json
from paddlemix.dry_run.plan import plan_run
from paddlemix.errors import Stopped, UserError
from paddlemix.log import read_metrics
from paddlemix.trainer import recipe
from paddlemix.trainer.callbacks.progress import Progress
from paddlemix.trainer.callbacks.stopping import StopOnSignal
from paddlemix.trainer.evaluator import Evaluator
from paddlemix.trainer.loss import LossModel
from paddlemix.trainer.recipe import run_recipe
from paddlemix.trainer.trainer import LlavaTrainer
from tests.tiny_world import LORA, World, changed, reports, weights


def test_a_loss_that_is_no_number_stops_and_names_the_samples(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LossModel.forward

    def forward(self: LossModel, **batch: Any) -> tuple[paddle.Tensor, paddle.Tensor]:
        loss, right = original(self, **batch)
        return loss * float("nan"), right

    monkeypatch.setattr(LossModel, "forward", forward)
    config = world.config(tmp_path / "out")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(UserError, match=r"the loss of step 1 is nan in the batch of .*train.json record \d+; .*record"):
        run_recipe(config)
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "out" / "config.json").exists()


def send_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Sends this process a signal when a step is reported."""
    original = Progress.on_log

    def report(self: Progress, args: Any, state: Any, control: Any, **rest: Any) -> None:
        original(self, args, state, control, **rest)
        if state.global_step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Progress, "on_log", report)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_ends_in_order(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)}
    run_recipe(world.config(tmp_path / "whole", max_steps=5, **LORA))
    config = world.config(tmp_path / "out", max_steps=5, **LORA)
    send_at(monkeypatch, 2, number)
    with pytest.raises(Stopped) as stopped:
        run_recipe(config)
    assert stopped.value.code == 128 + number
    assert {kind: signal.getsignal(kind) for kind in before} == before
    assert (tmp_path / "out" / "checkpoint-3" / "training_state.json").is_file()
    monkeypatch.undo()
    assert run_recipe(config)["steps"] == 5
    assert not changed(weights(tmp_path / "whole"), weights(tmp_path / "out"))


@pytest.mark.parametrize("steps", [4, 2])
def test_a_signal_during_an_evaluation_saves_at_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """An evaluation may take hours: it is broken off, and made first by the resumed run, also where no step is left."""
    changes = {"evaluation_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 1, "max_steps": steps}
    run_recipe(world.config(tmp_path / "whole", **changes, **LORA))
    original, batches = LlavaTrainer._score, []

    def score(self: LlavaTrainer, inputs: Any) -> Any:
        batches.append(inputs)
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, inputs)

    monkeypatch.setattr(LlavaTrainer, "_score", score)
    with pytest.raises(Stopped):
        run_recipe(world.config(tmp_path / "out", **changes, **LORA))
    assert len(batches) == 1
    state = read_json(tmp_path / "out" / "checkpoint-2" / "training_state.json")
    assert state["evaluation_due"] is True and state["evaluations"] == []
    monkeypatch.undo()
    monkeypatch.setattr(LlavaTrainer, "_score", lambda self, inputs: batches.append(inputs) or original(self, inputs))
    run_recipe(world.config(tmp_path / "out", **changes, **LORA))
    assert len(batches) > 1
    losses = [
        [line["eval_loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if "eval_loss" in line]
        for name in ("whole", "out")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == steps // 2
    assert not changed(weights(tmp_path / "whole"), weights(tmp_path / "out"))


def test_a_last_evaluation_that_was_broken_off_is_made_before_the_result(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps are done then, and the last one may be the best."""
    changes = {"evaluation_strategy": "steps", "eval_steps": 1, "max_steps": 2, "save_strategy": "steps"}
    changes |= {"save_steps": 1, "load_best_model_at_end": True}
    losses = [5.0, 4.0]
    score = Evaluator.sums

    def sums(self: Evaluator, dataset: Any, share: Any) -> tuple[float, float, int]:
        if interrupts and len(losses) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            score(self, dataset, share)
        return losses.pop(0), 1.0, 1

    monkeypatch.setattr(Evaluator, "sums", sums)
    interrupts = True
    config = world.config(tmp_path, **changes, **LORA)
    for _ in range(2):  # and once more while it is caught up on
        with pytest.raises(Stopped):
            run_recipe(config)
    interrupts = False
    run_recipe(config)
    assert not losses and not (tmp_path / "checkpoint-3").exists()
    found = [line["eval_loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if "eval_loss" in line]
    assert found == [5.0, 4.0]
    last, result = weights(tmp_path / "checkpoint-2"), weights(tmp_path)
    assert not changed(last, result) and changed(weights(tmp_path / "checkpoint-1"), result)


def test_a_signal_while_the_result_is_written_waits_for_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps are done, and without a checkpoint they would be lost."""
    write = recipe.write_files

    def signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return write(*arguments)

    monkeypatch.setattr(recipe, "write_files", signalled)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped):
        run_recipe(world.config(tmp_path / "out", save_strategy="no", **LORA))
    assert (tmp_path / "out" / "lora_config.json").is_file() and signal.getsignal(signal.SIGTERM) is before


def test_a_later_signal_ends_at_once_and_a_repeat_is_the_same_one() -> None:
    """Paddle's launcher sends SIGTERM three times, 0.2 seconds apart."""
    before, now = signal.getsignal(signal.SIGINT), [100.0]
    stop = StopOnSignal(clock=lambda: now[0])
    stop.on_train_begin(None, None, None)
    for now[0] in (100.0, 100.2, 105.0):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == stop.decided() == signal.SIGINT and signal.getsignal(signal.SIGINT) is not before
    now[0] = 105.1
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_ignored_signal_stays_ignored() -> None:
    """As `nohup` and a script's background job start with it."""
    before, stop = signal.signal(signal.SIGINT, signal.SIG_IGN), StopOnSignal()
    try:
        stop.on_train_begin(None, None, None)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received is None
        stop.on_train_end(None, None, None)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        stop.restore()
        signal.signal(signal.SIGINT, before)


def test_a_gradient_that_is_no_number_stops_before_a_weight_changes(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss can be finite where its gradient is not: here the square root of zero, added without changing the loss."""
    original = LossModel.forward
    models = []

    def forward(self: LossModel, **batch: Any) -> tuple[paddle.Tensor, paddle.Tensor]:
        loss, right = original(self, **batch)
        models.append((self.model, {name: value.numpy() for name, value in self.model.named_parameters()}))
        return loss + paddle.sqrt(self.model.lm_head.weight.sum() * 0.0) * 0.0, right

    monkeypatch.setattr(LossModel, "forward", forward)
    with pytest.raises(
        UserError, match=r"the gradient's norm of step 1 is nan in the batch of .*train.json record \d+;"
    ):
        run_recipe(world.config(tmp_path / "out", max_grad_norm=0))
    [(model, before)] = models
    assert all(np.array_equal(value.numpy(), before[name]) for name, value in model.named_parameters())


def test_stopping_early(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 2.0, 1.995, 2.5, 1.0, 1.0])

    monkeypatch.setattr(Evaluator, "sums", lambda self, dataset, share: (next(losses), 1.0, 1))
    config = world.config(
        tmp_path,
        max_steps=6,
        evaluation_strategy="steps",
        eval_steps=1,
        early_stopping_patience=2,
        early_stopping_threshold=0.01,
    )
    assert run_recipe(config)["steps"] == 4  # 1.995 and 2.5 are no gain
    assert (tmp_path / "config.json").is_file()


def test_patience_needs_evaluations(world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="early_stopping_patience needs evaluations"):
        world.config(tmp_path, early_stopping_patience=2)


def test_resume_with_another_recipe(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_recipe(world.config(tmp_path, save_strategy="steps", save_steps=2))
    other: dict[str, Any] = {"resume_from_checkpoint": str(tmp_path / "checkpoint-2"), "learning_rate": 0.002}
    with pytest.raises(UserError, match=r"other settings: .*learning_rate 0.001 -> 0.002.* allow_changed_recipe"):
        run_recipe(world.config(tmp_path, **other))
    (note,) = [note for note in plan_run(world.config(tmp_path, **other)).notes if "would stop" in note]
    assert note.startswith("the run would stop: ") and "learning_rate 0.001 -> 0.002" in note
    caplog.clear()
    results = run_recipe(world.config(tmp_path, **other, allow_changed_recipe=True, logging_steps=2))
    assert results["steps"] == 4
    assert "learning_rate 0.001 -> 0.002" in caplog.text
    assert read_json(tmp_path / "run_config.json")["learning_rate"] == 0.002


# ---- data that cannot be used ----


def broken_data(world: World, folder: Path) -> list[dict[str, Any]]:
    """The training data and after it a record without answer and one whose picture is gone."""
    records = json.loads((world.data / "train.json").read_text(encoding="utf-8"))
    records.append({"conversations": [["How many?", ""]]})
    records.append({"image": "images/gone.png", "conversations": [["<image>\nHow many?", "two"]]})
    path = folder / "train.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return [{"data_files": str(path)}]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_bad_samples_are_left_out_and_named(world: World, tmp_path: Path, packed: bool) -> None:
    run: dict[str, Any] = {"dataset": {"train": broken_data(world, tmp_path)}, "max_steps": 8, "mixtoken": packed}
    with pytest.raises(UserError, match="record 12: turn 2: the answer is empty"):
        run_recipe(world.config(tmp_path / "out", **run))
    run |= {"on_bad_sample": "skip", "max_bad_fraction": 0.2}
    run_recipe(world.config(tmp_path / "out", **run))
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert "record 12" in lines[0]["reason"]
    assert lines[0]["index"] is None
    [gone] = lines[1:]
    assert gone["index"] == 12 and "gone.png" in gone["reason"]


def test_half_a_line_of_a_killed_run_spoils_no_other(world: World, tmp_path: Path) -> None:
    run: dict[str, Any] = {"dataset": {"train": broken_data(world, tmp_path)}, "max_steps": 8, "save_steps": 1}
    run |= {"on_bad_sample": "skip", "max_bad_fraction": 0.2, "save_strategy": "steps"}
    run_recipe(world.config(tmp_path / "out", **run))
    path, log = tmp_path / "out" / "skipped.jsonl", read_metrics(tmp_path / "out" / "skipped.jsonl")
    assert [line["index"] for line in log] == [None, 12]
    path.write_bytes(path.read_bytes()[:-9])  # the second line breaks off
    first = {"resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-1"), "overwrite_output_dir": True}
    run_recipe(world.config(tmp_path / "out", **{**run, **first, "max_steps": 14}))  # and is met again
    assert read_metrics(path) == log


def test_too_many_bad_samples_end_the_run(world: World, tmp_path: Path) -> None:
    run: dict[str, Any] = {"dataset": {"train": broken_data(world, tmp_path)}, "on_bad_sample": "skip"}
    with pytest.raises(UserError, match=r"1 of 14 samples cannot be used, max_bad_fraction 0.05 allows 0"):
        run_recipe(world.config(tmp_path / "out", **run, max_bad_fraction=0.05))


@pytest.mark.parametrize("order", ["mixtoken", "group_by_length", "group_by_modality_length"])
def test_every_order_trains_each_sample_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    seen: list[str] = []
    original = LlavaTrainer.training_step

    def step(self: LlavaTrainer, model: Any, inputs: Any, step_control: int = 0) -> Any:
        seen.extend(inputs["sources"])
        return original(self, model, inputs, step_control)

    monkeypatch.setattr(LlavaTrainer, "training_step", step)
    run = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 1, order: True}
    run_recipe(world.config(tmp_path, **run))
    assert len(seen) == 12 and len(set(seen)) == 12
    assert np.isfinite(list(reports(tmp_path).values())).all()
