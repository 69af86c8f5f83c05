"""Checkpoints that are not as they were saved: each kind of damage is one clear error, which says what is whole."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paddlemix.checkpoints.files.weight_files import read_json, write_json
from paddlemix.errors import UserError
from paddlemix.trainer import recipe, trainer
from paddlemix.trainer.evaluator import Evaluator
from paddlemix.trainer.recipe import run_recipe
from paddlemix.trainer.resuming.checkpoint_check import check_checkpoint, find_damage
from paddlemix.trainer.resuming.checkpoint_folders import CHECKSUMS_FILE
from tests.tiny_world import World, changed, weights

STATES = ("training_state.json", "trainer_state.json")
EVERY: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


@pytest.fixture(scope="module")
def saved(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with checkpoint-2 and checkpoint-4; tests change copies."""
    out = tmp_path_factory.mktemp("saved") / "out"
    run_recipe(world.config(out, **EVERY))
    return out


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "out"))


def without_checksums(checkpoint: Path) -> Path:
    """As an earlier version saved it."""
    (checkpoint / CHECKSUMS_FILE).unlink()
    return checkpoint


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = read_json(path)
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


DAMAGES: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "no JSON": lambda text: "step 4",
    "zeros": lambda text: "\0" * len(text),
    "a list": lambda text: f"[{text}]",
    "a number": lambda text: "4",
    "null": lambda text: "null",
    "an empty object": lambda text: "{}",
    "deep": lambda text: "[" * 100_000,
    "text for a number": lambda text: text.replace('"global_step": 4', '"global_step": "4"'),
    "negative": lambda text: text.replace('"global_step": 4', '"global_step": -4'),
    "NaN": lambda text: text.replace('"global_step": 4', '"global_step": NaN'),
    "a fraction": lambda text: text.replace('"global_step": 4', '"global_step": 4.5'),
    "true": lambda text: text.replace('"global_step": 4', '"global_step": true'),
    "absurd": lambda text: text.replace('"global_step": 4', f'"global_step": 1{"0" * 5000}'),
    "a key less": lambda text: text.replace('"global_step"', '"globalstep"'),
    "another step": lambda text: text.replace('"global_step": 4', '"global_step": 3'),
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_one_clear_error(run: Path, name: str, damage: str) -> None:
    path = without_checksums(run / "checkpoint-4") / name  # which would find it anyway
    before = path.read_text(encoding="utf-8")
    path.write_text(DAMAGES[damage](before), encoding="utf-8")
    assert path.read_text(encoding="utf-8") != before
    with pytest.raises(UserError) as caught:
        check_checkpoint(run / "checkpoint-4")
    said = str(caught.value)
    assert said.startswith(f"{run / 'checkpoint-4'} cannot be resumed: ") and name in said and "\n" not in said
    assert f"checkpoint-2 is whole: set resume_from_checkpoint to '{run / 'checkpoint-2'}'" in said
    assert len(said) < 1000


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schedule", None),
        ("schedule", {}),
        ("schedule", {"last_epoch": "4", "last_lr": 0.1}),
        ("schedule", {"last_epoch": 4, "last_lr": float("nan")}),
        ("schedule", {"last_epoch": 5, "last_lr": 0.1}),
        ("schedule", {"last_epoch": 3, "last_lr": 0.1}),
        ("scaler", []),
        ("scaler", {"scale": ["x"]}),
        ("tokens_seen", -1),
        ("tokens_seen", float("inf")),
        ("evaluations", {}),
        ("evaluations", ["1"]),
        ("own_checkpoints", [4]),
        ("recipe", "lora"),
    ],
)
def test_wrong_values_of_the_training_state(run: Path, key: str, value: Any) -> None:
    edit(without_checksums(run / "checkpoint-4") / STATES[0], lambda values: values.update({key: value}))
    damage = find_damage(run / "checkpoint-4")
    assert damage is not None and (key in damage or "schedule" in damage)


@pytest.mark.parametrize(
    ("key", "value"),
    [("log_history", {}), ("log_history", [1]), ("epoch", None), ("epoch", -1), ("total_flos", "0")]
    + [("best_model_checkpoint", 3), ("is_world_process_zero", "yes"), ("max_steps", None), ("of_tomorrow", 1)],
)
def test_wrong_values_of_the_progress_record(run: Path, key: str, value: Any) -> None:
    edit(without_checksums(run / "checkpoint-4") / STATES[1], lambda values: values.update({key: value}))
    damage = find_damage(run / "checkpoint-4")
    assert damage is not None and key in damage and "trainer_state.json" in damage


def test_random_damage_is_never_a_traceback(run: Path) -> None:
    draw = random.Random(5)
    checkpoint = without_checksums(run / "checkpoint-4")
    for name in STATES:
        path = checkpoint / name
        before = path.read_bytes()
        for _ in range(150):
            content = bytearray(before)
            for _ in range(draw.randint(1, 4)):
                place = draw.randrange(len(content))
                content[place : place + draw.choice((0, 1, 1, 3, 40))] = draw.randbytes(draw.choice((0, 1, 2)))
            path.write_bytes(content)
            find_damage(checkpoint)  # raises nothing
        path.write_bytes(before)
    assert find_damage(checkpoint) is None


def test_every_file_has_a_checksum(run: Path) -> None:
    files = read_json(run / "checkpoint-4" / CHECKSUMS_FILE)["files"]
    names = {path.name for path in (run / "checkpoint-4").iterdir()} - {CHECKSUMS_FILE}
    assert files.keys() == names and {"model.safetensors", "optimizer.safetensors", *STATES, "config.json"} <= names
    assert find_damage(run / "checkpoint-4") is None


@pytest.mark.parametrize("place", [0, 0.5, -1])
def test_one_flipped_bit_anywhere_is_found(run: Path, place: float) -> None:
    checkpoint = run / "checkpoint-4"
    for name in read_json(checkpoint / CHECKSUMS_FILE)["files"]:
        path = checkpoint / name
        content = bytearray(path.read_bytes())
        content[int(place * len(content)) if place >= 0 else -1] ^= 4
        path.write_bytes(content)
        damage = find_damage(checkpoint)
        assert damage is not None and name in damage
        content[int(place * len(content)) if place >= 0 else -1] ^= 4
        path.write_bytes(content)
    assert find_damage(checkpoint) is None


def test_files_that_are_gone_or_cut(run: Path) -> None:
    checkpoint = run / "checkpoint-4"
    content = (checkpoint / "optimizer.safetensors").read_bytes()
    (checkpoint / "optimizer.safetensors").write_bytes(content[:-8])
    assert "'optimizer.safetensors' has " in str(find_damage(checkpoint))
    (checkpoint / "optimizer.safetensors").unlink()
    assert "its file 'optimizer.safetensors' is missing" in str(find_damage(checkpoint))


@pytest.mark.parametrize("content", ["", "[]", '{"files": []}', '{"files": {}}', '{"files": {"a": 1}}'])
def test_checksums_that_are_damaged_themselves(run: Path, content: str) -> None:
    (run / "checkpoint-4" / CHECKSUMS_FILE).write_text(content, encoding="utf-8")
    assert CHECKSUMS_FILE in str(find_damage(run / "checkpoint-4"))


def test_a_folder_with_another_number(run: Path) -> None:
    (run / "checkpoint-4").rename(run / "checkpoint-9")
    damage = find_damage(run / "checkpoint-9")
    assert damage == "global_step of training_state.json is 4, but the folder is checkpoint-9"
    (run / "checkpoint-9").rename(run / "kept")
    assert find_damage(run / "kept") is None


def test_nothing_earlier_is_whole(run: Path) -> None:
    for step in (2, 4):
        (run / f"checkpoint-{step}" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="No earlier checkpoint beside it is whole: copy the file again"):
        check_checkpoint(run / "checkpoint-4")


def test_a_run_refuses_and_takes_the_whole_one(world: World, run: Path, saved: Path) -> None:
    path = run / "checkpoint-4" / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="'optimizer.safetensors' is not as it was saved.*checkpoint-2 is whole"):
        run_recipe(world.config(run, **EVERY))
    run_recipe(world.config(run, **EVERY, resume_from_checkpoint=str(run / "checkpoint-2")))
    assert not changed(weights(saved), weights(run))


def test_a_checkpoint_that_lost_its_state_stops_the_run(world: World, run: Path, saved: Path) -> None:
    """Neither an older one nor a new start takes its place without a word; what it holds is kept."""
    (run / "checkpoint-4" / "training_state.json").unlink()
    with pytest.raises(UserError, match="-4 cannot be resumed: its training_state.json is missing.*-2 is whole: set"):
        run_recipe(world.config(run, **EVERY))
    run_recipe(world.config(run, **EVERY, resume_from_checkpoint=str(run / "checkpoint-2")))
    assert not changed(weights(saved), weights(run)) and (run / "checkpoint-4.earlier").is_dir()


def test_a_run_goes_on_from_a_checkpoint_that_was_linked_back(world: World, run: Path, tmp_path: Path) -> None:
    for step in (2, 4):
        shutil.move(run / f"checkpoint-{step}", tmp_path / "disk" / f"checkpoint-{step}")
        (run / f"checkpoint-{step}").symlink_to(tmp_path / "disk" / f"checkpoint-{step}")
    longer = {**EVERY, "max_steps": 6, "save_total_limit": 2}
    assert run_recipe(world.config(run, **longer))["steps"] == 6
    kept = sorted(path.name for path in run.glob("checkpoint-*"))
    assert kept == ["checkpoint-4", "checkpoint-6"] and len(list((tmp_path / "disk").iterdir())) == 2


def test_a_checkpoint_without_checksums_goes_on_with_a_note(
    world: World, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(recipe.logger, "info", lambda text, *values: told.append(text % values))
    for step in (2, 4):
        without_checksums(run / f"checkpoint-{step}")
    assert run_recipe(world.config(run, **{**EVERY, "max_steps": 6}))["steps"] == 6
    assert any("checkpoint-4 has no checksums, it was saved by an earlier version" in text for text in told)


def test_the_best_checkpoint_is_looked_at_too(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [1.0, 2.0]
    monkeypatch.setattr(Evaluator, "sums", lambda self, data, share: (losses.pop(0), 1.0, 1))
    save = trainer.LlavaTrainer._save_checkpoint

    def damage(self: Any, model: Any, metrics: Any = None) -> None:
        save(self, model, metrics)
        if self.state.global_step == 4:
            write_json(tmp_path / "checkpoint-2" / "config.json", {})

    monkeypatch.setattr(trainer.LlavaTrainer, "_save_checkpoint", damage)
    values = {**EVERY, "evaluation_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    with pytest.raises(UserError, match="checkpoint-2, cannot be loaded: 'config.json' has 3 bytes") as raised:
        run_recipe(world.config(tmp_path, **values))
    assert "set load_best_model_at_end false" in str(raised.value) and "resume" not in str(raised.value)
    run_recipe(world.config(tmp_path, **{**values, "load_best_model_at_end": False}))  # the advice helps
    assert not changed(weights(tmp_path / "checkpoint-4"), weights(tmp_path))
