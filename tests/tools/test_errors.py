"""What a user can get wrong: one clear error, exit status 2, no traceback, and nothing is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paddlemix.examples.llava import pretrain
from paddlemix.tools import supervised_finetune
from paddlemix.tools.common.command import run_command
from tests.conftest import HANG, ROOT
from tests.tiny_world import World, without_weight


def finetune(recipe: Path, *arguments: str) -> int:
    return run_command(supervised_finetune.main, [str(recipe), *arguments])


def error_of(capsys: pytest.CaptureFixture[str], status: int) -> str:
    """The message behind `error: `, after a look that it is the only one."""
    captured = capsys.readouterr()
    assert status == 2
    assert "Traceback" not in captured.err and captured.out == ""
    assert captured.err.count("error: ") == 1
    return captured.err.partition("error: ")[2].rstrip("\n")


def line_of(path: Path, text: str) -> int:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def write_records(folder: Path, world: World, *changes: tuple[int, dict[str, Any]]) -> dict[str, Any]:
    """A data file whose records of these numbers are changed, as the recipe's `dataset`."""
    records = json.loads((world.data / "train.json").read_text(encoding="utf-8"))
    for number, values in changes:
        records[number] = {**records[number], **values}
    path = folder / "records.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return {"dataset": {"train": [{"data_files": str(path)}]}}


# ---- the JSON file ----


@pytest.mark.parametrize(
    ("values", "line", "message"),
    [
        ({"learning_rat": 0.1}, 'learning_rat"', "learning_rat is not a known key; did you mean 'learning_rate'?"),
        ({"learning_rate": "2e-4"}, "learning_rate", "expected a number, got text '2e-4'; remove the quotes"),
        ({"max_steps": 2.5}, "max_steps", "max_steps: expected a whole number, got the number 2.5"),
        ({"lora": "yes"}, "lora", "lora: expected true or false, got text 'yes'"),
        (
            {"image_aspect_ratio": "sqare"},
            "image_aspect_ratio",
            "is not one of square, pad, anyres; did you mean 'square'",
        ),
        ({"dataset": {"train": [{"data_file": "x"}]}}, "data_file", "data_file"),
    ],
)
def test_a_fault_of_one_key(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], values: dict[str, Any], line: str, message: str
) -> None:
    recipe = world.recipe(tmp_path, **values)
    found = error_of(capsys, finetune(recipe))
    assert f"{recipe}, line {line_of(recipe, line)}: " in found and message in found
    assert not (tmp_path / "out").exists()


def test_all_faults_of_a_file_are_shown_together(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"learning_rat": 1, "max_steps": "ten", "bf16": True, "fp16": True, "warmup_ratio": 3, "lora_rank": 0}
    recipe = world.recipe(tmp_path, **values)
    lines = error_of(capsys, finetune(recipe, "sede=1")).splitlines()
    assert len(lines) == 6
    order = ["max_steps", "learning_rat ", "fp16", "warmup_ratio", "lora_rank"]
    for line, key in zip(lines, order, strict=False):
        assert line.startswith(f"{recipe}, line ") and key in line
    assert lines[-1] == "command line: sede is not a known key; did you mean 'seed'?"
    assert not (tmp_path / "out").exists()


def test_broken_json_names_its_line(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = world.recipe(tmp_path)
    broken = recipe.read_text(encoding="utf-8").replace('"max_steps": 4,', '"max_steps": 4')
    recipe.write_text(broken, encoding="utf-8")
    found = error_of(capsys, finetune(recipe))
    assert f"{recipe}, line {line_of(recipe, 'max_steps') + 1}" in found and "comma missing" in found


def test_a_missing_recipe_gets_a_suggestion(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world.recipe(tmp_path)
    found = error_of(capsys, finetune(tmp_path / "recipes.json"))
    assert f"{tmp_path / 'recipes.json'} does not exist; did you mean 'recipe.json'?" in found


# ---- data ----


def test_a_missing_data_file(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = world.recipe(tmp_path, dataset={"train": [{"data_files": str(tmp_path / "none.json")}]})
    found = error_of(capsys, finetune(recipe))
    assert f"data file '{tmp_path / 'none.json'}' does not exist" in found and "\n" not in found
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("number", "values", "message"),
    [
        (4, {"image": "images/99.png"}, "image '{data}/images/99.png' does not exist"),
        (5, {"image": "train.json"}, "image '{data}/train.json' is not an image file that can be read"),
        (0, {"conversations": [{"from": "gpt", "value": "a"}]}, "turn 1 is by the assistant, expected the user"),
        (3, {"conversations": [{"from": "human", "value": "a"}] * 2}, "turn 2 is by the user, expected the assistant"),
        (7, {"conversations": [["What?", "  "]]}, "turn 2: the answer is empty, so there is nothing to learn"),
        (11, {"conversations": [{"from": "human", "value": "What?"}]}, "the last question has no answer"),
        (1, {"conversations": [["Where is it?", "Here"]]}, "0 <image> in the questions but 1 in 'image'"),
        (2, {"conversations": []}, "'conversations' is not a list of turns or is empty"),
    ],
)
def test_a_bad_record_is_named(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int, values: dict[str, Any], message: str
) -> None:
    recipe = world.recipe(tmp_path, **write_records(tmp_path, world, (number, values)))
    found = error_of(capsys, finetune(recipe))
    assert found.startswith(f"{tmp_path / 'records.json'} record {number}: ") and "\n" not in found
    assert message.format(data=world.data) in found
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_breaks_off_ends_the_run_when_its_turn_comes(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Its header is whole, and the data set is too large to decode every picture beforehand."""
    monkeypatch.setattr("paddlemix.datasets.image_check._DECODED_BYTES", 0)
    (tmp_path / "cut.png").write_bytes(world.picture.read_bytes()[:300])
    data = write_records(tmp_path, world, (0, {"image": str(tmp_path / "cut.png")}))
    recipe = world.recipe(tmp_path, **data, max_steps=6, dataloader_num_workers=workers)
    found = error_of(capsys, finetune(recipe))
    assert found.startswith(f"{tmp_path / 'records.json'} record 0: image '{tmp_path / 'cut.png'}' is broken: ")
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_picture_that_breaks_off_is_found_before_anything_is_written(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cut.png").write_bytes(world.picture.read_bytes()[:300])
    recipe = world.recipe(tmp_path, **write_records(tmp_path, world, (2, {"image": str(tmp_path / "cut.png")})))
    assert f"records.json record 2: image '{tmp_path / 'cut.png'}' is broken: " in error_of(capsys, finetune(recipe))
    assert not (tmp_path / "out").exists()


def test_a_sample_longer_than_the_limit(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = error_of(capsys, finetune(world.recipe(tmp_path, max_length=20)))
    assert "train.json record " in found and "max_length is 20; raise max_length or remove the record" in found


def test_the_plain_template_takes_captions_only(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run_command(pretrain.main, [str(world.recipe(tmp_path))])
    found = error_of(capsys, status)
    assert "train.json record 0: template 'plain' needs one image and one caption" in found
    assert not (tmp_path / "out").exists()


# ---- model and device ----


def test_a_missing_model(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = error_of(capsys, finetune(world.recipe(tmp_path, model_name_or_path=str(tmp_path / "none"))))
    assert str(tmp_path / "none") in found and "does not exist" in found and "\n" not in found
    assert not (tmp_path / "out").exists()


def test_a_missing_weight(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = without_weight(world.model, tmp_path / "model", "language_model.layers.1.mlp.up_proj.weight")
    found = error_of(capsys, finetune(world.recipe(tmp_path, model_name_or_path=str(model))))
    assert "missing" in found and "language_model.layers.1.mlp.up_proj.weight" in found and str(model) in found
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"lora": True, "lora_target_modules": ["llama.layer.*w_proj"]},
            "'llama.layer.*w_proj' matches no linear layer",
        ),
        ({"freeze_include": ["*lama.layer*", "*visual*"]}, "freeze_include: '*visual*' matches no parameter"),
        ({"freeze_include": ["*"]}, "nothing trains"),
        ({"bf16": True}, "bfloat16 cannot be computed on CPU"),
        ({"fp16": True}, "float16 cannot be computed on CPU"),
        ({"dtype": "bfloat16"}, "bfloat16 cannot be computed on CPU"),
        ({"device": "npu"}, "device='npu' cannot be used here"),
        ({"flatten_param_grads": True}, "flatten_param_grads true is for npu alone, this run computes on cpu"),
        ({"lora_path": "none"}, "none/lora_config.json' does not exist"),
        ({"resume_from_checkpoint": "none/checkpoint-1"}, "'none/checkpoint-1' is not a complete checkpoint"),
        ({"chat_template": "vicuna"}, "'vicuna' is not one of"),
    ],
)
def test_a_run_that_cannot_be(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], values: dict[str, Any], message: str
) -> None:
    found = error_of(capsys, finetune(world.recipe(tmp_path, **values)))
    assert message in found and "\n" not in found
    assert not (tmp_path / "out").exists()


def test_a_folder_with_content(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine", encoding="utf-8")
    found = error_of(capsys, finetune(world.recipe(tmp_path)))
    assert "is not empty and holds no checkpoint to resume from; set overwrite_output_dir to true" in found
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_the_folder_of_the_model_itself(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in world.model.iterdir())
    recipe = world.recipe(tmp_path, output_dir=str(world.model), overwrite_output_dir=True, lora=True)
    assert "is the run's own model_name_or_path" in error_of(capsys, finetune(recipe))
    assert sorted(path.name for path in world.model.iterdir()) == before


# ---- as a process ----


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rat": 0.1},
        {"model_name_or_path": "none"},
    ],
    ids=["before paddle", "behind paddle"],
)
def test_a_process_ends_with_status_2_and_one_line(world: World, tmp_path: Path, values: dict[str, Any]) -> None:
    command = [sys.executable, "paddlemix/tools/supervised_finetune.py", str(world.recipe(tmp_path, **values))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
