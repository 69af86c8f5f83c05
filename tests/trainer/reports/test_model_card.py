"""The card that a run leaves: its facts, commands that parse, and somebody else's README.md untouched."""

from __future__ import annotations

import importlib
import json
import logging
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from paddlemix.__main__ import COMMANDS
from paddlemix.config.load import load_config, parse_command_line
from paddlemix.trainer.recipe import run_recipe
from paddlemix.trainer.reports.model_card import MARKER, CardFacts, is_own_card, render_card
from tests.tiny_world import LORA, World, reports


def card_of(output_dir: Path) -> str:
    return (output_dir / "README.md").read_text(encoding="utf-8")


def commands_in(card: str) -> list[list[str]]:
    block = re.findall(r"```bash\n(.*?)```", card, re.DOTALL)[0]
    return [shlex.split(line) for line in block.splitlines()]


def facts(world: World, output_dir: Path, **changes: Any) -> CardFacts:
    values: dict[str, Any] = {
        "config": world.config(output_dir),
        "parts": {"vision_tower": (0, 0), "language_model": (5, 1_234_567)},
        "adapter": None,
        "has_tower": True,
        "files": [("train", "a|b.json", 1234)],
        "skipped": 0,
        "results": {"steps": 4},
    }
    return CardFacts(**{**values, **changes})


def test_the_card_of_an_adapter(world: World, tmp_path: Path) -> None:
    out = tmp_path / "my adapter"
    evaluation = {"evaluation_strategy": "steps", "eval_steps": 2, "eval_with_do_generation": True}
    run_recipe(world.config(out, sample_steps=4, max_new_tokens=3, wandb_api_key="a-secret", **evaluation, **LORA))
    card = card_of(out)
    assert card.startswith("---\nbase_model: ") and MARKER in card and "a-secret" not in card
    assert "LoRA adapter (rank 4, alpha 8) for" in card and f"`{world.model}`" in card
    assert "| `learning_rate` | `0.001` |" in card and "| `lora_dropout` | `0.1` |" in card
    assert f"| train | `{world.data / 'train.json'}` | 12 |" in card and "eval.json` | 5 |" in card
    assert "No training sample was left out." in card
    assert f"| loss at step 4 | {reports(out)[4]:.4f} |" in card
    for name in ("eval_loss", "eval_exact_match", "eval_rouge_l"):
        assert f"| {name} | {reports(out, name)[4]:.4f} |" in card
    assert "![Loss over steps](loss.png)" in card
    assert "## Answers" in card and "On the mat, 0.25, 0.33." in card
    assert "| paddlepaddle | 3." in card and "1 process |" in card
    with Image.open(out / "loss.png") as picture:
        assert picture.size[0] > 500


def test_the_commands_of_a_card_parse_and_name_the_right_places(world: World, tmp_path: Path) -> None:
    out = tmp_path / "my adapter"
    run_recipe(world.config(out, max_steps=1, **LORA))
    chat, merge, convert, again = commands_in(card_of(out))
    for words in (chat, merge, convert):
        assert words[0] == "paddlemix"
        importlib.import_module(COMMANDS[words[1]].module).build_parser().parse_args(words[2:])
    assert chat[3] == merge[3] == str(out) and merge[5] == convert[3]
    path, overrides = parse_command_line(again[2:], "finetune", "")
    assert path is not None and load_config(path, overrides).output_dir == f"{out}-again"


def test_the_card_of_a_whole_model_says_nothing_of_adapters(world: World, tmp_path: Path) -> None:
    run_recipe(world.config(tmp_path, max_steps=1))
    assert [words[1] for words in commands_in(card_of(tmp_path))] == ["chat", "convert", "finetune"]
    assert "adapter" not in card_of(tmp_path)


def test_a_text_only_model_cannot_be_shown_images(world: World, tmp_path: Path) -> None:
    card = render_card(facts(world, tmp_path, has_tower=False), [], [], False)
    assert [words[1] for words in commands_in(card)] == ["convert", "finetune"]
    assert "text-generation" in card and "loss.png" not in card and "## Answers" not in card


def test_cells_and_counts(world: World, tmp_path: Path) -> None:
    sample = {"step": 4, "image": None, "question": "<b>|\nx", "answer": "a\n\nb", "expected": None}
    samples = [{**sample, "step": 2, "question": "earlier"}, sample]
    card = render_card(facts(world, tmp_path, skipped=3), [], samples, False)
    assert "| language_model | 1,234,567 | 5 |" in card and "vision_tower |" not in card
    assert "`a\\|b.json` | 1,234 |" in card
    assert "3 training samples were left out; `skipped.jsonl` names them." in card
    assert "|  | &lt;b>\\| x | a b |  |" in card
    assert "Greedy, at step 4;" in card and "earlier |" not in card


def test_the_best_evaluation_is_told_beside_the_last(world: World, tmp_path: Path) -> None:
    metrics = [{"step": step, "eval_loss": loss, "eval_token_accuracy": 0.5} for step, loss in ((2, 1.0), (4, 3.0))]
    config = world.config(tmp_path, evaluation_strategy="steps", eval_steps=2)
    card = render_card(facts(world, tmp_path, config=config), metrics, [], False)
    assert "| evaluation | last (step 4) | best by eval_loss (step 2) |" in card
    assert "| eval_loss | 3.0000 | 1.0000 |" in card


def test_somebody_elses_readme_stays(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("paddlemix"), "propagate", True)
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger="paddlemix"):
        run_recipe(world.config(tmp_path, max_steps=1, overwrite_output_dir=True))
    assert card_of(tmp_path) == "mine"
    assert "README.md was not written by a run and is kept" in caplog.text


def test_a_runs_own_card_is_replaced_and_an_edited_one_without_the_mark_is_not(world: World, tmp_path: Path) -> None:
    run_recipe(world.config(tmp_path, max_steps=1, **LORA))
    assert is_own_card(tmp_path / "README.md")
    run_recipe(world.config(tmp_path, max_steps=1, overwrite_output_dir=True))
    assert "adapter" not in card_of(tmp_path)
    kept = card_of(tmp_path).replace(MARKER, "")
    (tmp_path / "README.md").write_text(kept, encoding="utf-8")
    run_recipe(world.config(tmp_path, max_steps=1, overwrite_output_dir=True, **LORA))
    assert card_of(tmp_path) == kept


def test_what_is_not_a_text_is_not_a_card_of_ours(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"\xff" + MARKER.encode())
    assert not is_own_card(tmp_path / "README.md") and not is_own_card(tmp_path)


def test_a_resumed_run_tells_of_all_its_steps(world: World, tmp_path: Path) -> None:
    values = {"save_strategy": "steps", "save_steps": 2}
    run_recipe(world.config(tmp_path, max_steps=2, **values))
    run_recipe(world.config(tmp_path, max_steps=4, **values))
    assert "| optimiser steps | 4 |" in card_of(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
