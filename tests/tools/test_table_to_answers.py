"""A VQA table becomes a trained, questioned model in four commands: convert, check, train, ask."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from paddlemix.tools import check_data, convert_data, predict, supervised_finetune
from paddlemix.tools.common.command import run_command
from tests.tiny_world import LORA, World


def test_a_table_becomes_a_model_that_answers(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As easy-vqa's tables are: columns question, answer, image_id; pictures are named by their numbers."""
    images = world.data / "images"
    table, data, evaluation = tmp_path / "questions.csv", tmp_path / "vqa.json", tmp_path / "vqa_eval.json"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "answer", "image_id"])
        writer.writerows([f"What colour is it, {number}?", "red", number % 6] for number in range(24))
    arguments = [str(table), "--output", str(data), "--image-root", str(images), "--split", "0.3"]
    assert run_command(convert_data.main, arguments) == 0
    assert run_command(check_data.main, [str(data), "--image-root", str(images), "--workers", "1"]) == 0
    assert "no problem found" in capsys.readouterr().out
    recipe = world.recipe(
        tmp_path / "run",
        dataset={"train": [{"data_files": str(data)}], "eval": [{"data_files": str(evaluation)}]},
        image_root=str(images),
        max_steps=1,
        **LORA,
    )
    assert run_command(supervised_finetune.main, [str(recipe)]) == 0
    trained, answers = json.loads(recipe.read_text())["output_dir"], tmp_path / "answers.jsonl"
    asked = ["--model-path", trained, "--input", str(evaluation), "--output", str(answers), "--image-root", str(images)]
    capsys.readouterr()
    assert run_command(predict.main, [*asked, "--max-new-tokens", "3", "--device", "cpu"]) == 0
    lines = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    expected = json.loads(evaluation.read_text(encoding="utf-8"))
    assert [line["reference"] for line in lines] == ["red"] * len(expected) and 0 < len(expected) < 24
    assert not any("error" in line for line in lines)
    assert f"{len(expected)} of {len(expected)} questions answered in this run" in capsys.readouterr().out
