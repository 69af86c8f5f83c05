"""The training commands as they are typed: a recipe's path, keys behind it, and what then stands in the folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from paddlemix import __main__ as front_door
from paddlemix.checkpoints.load import load_pretrained
from paddlemix.examples.llava import pretrain
from paddlemix.tools import supervised_finetune
from paddlemix.tools.common.command import run_command
from tests.conftest import HANG, ROOT
from tests.tiny_world import World, changed, reports, template_of, weights


def test_a_process_trains_and_says_how_it_goes(world: World, tmp_path: Path) -> None:
    """From another folder, by path, with two workers; results go nowhere but into output_dir."""
    recipe = world.recipe(tmp_path, dataloader_num_workers=2)
    command = [sys.executable, str(ROOT / "paddlemix/tools/supervised_finetune.py"), str(recipe)]
    arguments = ["max_steps=2", "--lora", "--lora_rank", "4", "--learning-rate=0.01"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    result = subprocess.run([*command, *arguments], cwd=elsewhere, capture_output=True, text=True, timeout=HANG)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    assert "Traceback" not in result.stderr and "Warning" not in result.stderr
    for text in ("language_model", "training data: 12 samples", "step 1/2 loss", "step 2/2 loss", "saved to"):
        assert text in result.stderr
    loaded = load_pretrained(tmp_path / "out")
    assert loaded.adapter is not None and loaded.adapter.r == 4
    assert not list(elsewhere.iterdir())
    # the same in this process, without workers: the same bits
    again = world.recipe(tmp_path / "again")
    assert run_command(supervised_finetune.main, [str(again), *arguments]) == 0
    assert reports(tmp_path / "out") == reports(tmp_path / "again" / "out")
    assert not changed(weights(tmp_path / "out"), weights(tmp_path / "again" / "out"))


def test_flags_alone_are_enough(world: World, tmp_path: Path) -> None:
    values = world.values(tmp_path / "out", max_steps=1)
    arguments = [part for key, value in values.items() for part in (f"--{key}", text_of(value))]
    assert run_command(supervised_finetune.main, arguments) == 0
    assert sorted(reports(tmp_path / "out")) == [1]


def text_of(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def test_pretraining_has_its_own_defaults_and_the_file_wins(world: World, tmp_path: Path) -> None:
    values = {"dataset": {"train": [{"data_files": str(world.data / "captions.json")}]}, "max_steps": 2}
    assert run_command(pretrain.main, [str(world.recipe(tmp_path / "a", **values))]) == 0
    before, after = weights(world.model), weights(tmp_path / "a" / "out")
    assert changed(before, after) == {name for name in before if name.startswith("projector.")}
    assert template_of(tmp_path / "a" / "out") == "plain"
    other = world.recipe(tmp_path / "b", **values, chat_template="vicuna_v1")
    assert run_command(pretrain.main, [str(other)]) == 0
    assert template_of(tmp_path / "b" / "out") == "vicuna_v1"


def test_the_front_door_leads_to_the_same_place(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["paddlemix"])
    assert front_door.main(["finetune", str(world.recipe(tmp_path)), "max_steps=1"]) == 0
    assert sorted(reports(tmp_path / "out")) == [1]


def test_a_folders_name_means_nothing(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`eclipse` and `samples` hold the words clip and sam; PaddleMIX took such a folder for another model."""
    folder = tmp_path / "eclipse" / "samples"
    shutil.copytree(world.model, folder / "llava-clip-lora")
    shutil.copytree(world.data, folder / "data")
    monkeypatch.chdir(folder)
    values = {
        "model_name_or_path": "llava-clip-lora",
        "image_root": "data",
        "dataset": {"train": [{"data_files": "data/train.json"}]},
        "output_dir": "plain-out",
    }
    assert run_command(supervised_finetune.main, [str(world.recipe(folder, **values))]) == 0
    here = weights(folder / "plain-out")
    assert run_command(supervised_finetune.main, [str(world.recipe(tmp_path / "other"))]) == 0
    assert not changed(here, weights(tmp_path / "other" / "out"))


def test_a_moved_adapter_finds_its_base_beside_it(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.model, tmp_path / "a" / "model")
    recipe = world.recipe(tmp_path / "a", model_name_or_path=str(tmp_path / "a" / "model"))
    assert run_command(supervised_finetune.main, [str(recipe), "--lora", "max_steps=1"]) == 0
    before = weights(tmp_path / "a" / "out")
    os.rename(tmp_path / "a", tmp_path / "b")
    assert not changed(before, weights(tmp_path / "b" / "out"))


@pytest.mark.parametrize("main", [supervised_finetune.main, pretrain.main])
def test_help_lists_the_keys(main: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(main, ["--help"])  # type: ignore[arg-type]
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "CONFIG.json [key=value ...]" in shown and "lora_rank: whole number; default 8; min 1" in shown
