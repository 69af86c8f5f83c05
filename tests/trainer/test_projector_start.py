"""Pretraining where the projector is new: PaddleMIX's own pretrain.json, a Vicuna that declares one, a text model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from paddlemix.checkpoints.files.weight_files import read_json, read_weights, write_json, write_safetensors
from paddlemix.checkpoints.load import load_pretrained
from paddlemix.config.load import load_config
from paddlemix.config.pretraining import DEFAULTS
from paddlemix.errors import UserError
from paddlemix.examples.llava import pretrain
from paddlemix.tools.common.command import run_command
from paddlemix.trainer.recipe import run_recipe
from tests.tiny_world import CLIP_TOWER, LORA, World, changed, weights

# Keys and values of PaddleMIX's pretrain.json (commit 6afaf05d).
ITS_PRETRAIN_FILE: dict[str, Any] = {
    "model_name_or_path": "paddlemix/llava/vicuna-13b-v1.5",
    "freeze_include": ["*llama*", "*lm_head*"],
    "freeze_exclude": ["*llama.mm_projector*"],
    "dataset": {
        "train": [{"name": "chatml_dataset", "data_files": "train.json"}],
        "eval": [{"name": "chatml_dataset", "data_files": "val.json"}],
    },
    "mixtoken": False,
    "output_dir": "./checkpoints/llava_pretrain_ckpts",
    "overwrite_output_dir": True,
    "recompute": True,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 1,
    "eval_accumulation_steps": 16,
    "num_train_epochs": 1,
    "learning_rate": 1e-3,
    "warmup_ratio": 0.03,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "save_steps": 100,
    "eval_steps": 120,
    "evaluation_strategy": "no",
    "save_strategy": "epoch",
    "max_length": 2048,
    "fp16": False,
    "fp16_opt_level": "O1",
    "do_train": True,
    "do_eval": False,
    "disable_tqdm": True,
    "save_total_limit": 1,
    "group_by_modality_length": False,
}
# What PaddleMIX's Vicuna declares of a projector that it does not have.
MM_KEYS = {
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": 48,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "use_mm_proj": True,
}


@pytest.fixture
def vicuna(world: World, tmp_path: Path) -> Path:
    """A language model whose config.json has the projector's keys."""
    directory = tmp_path / "vicuna"
    shutil.copytree(world.llama, directory)
    change(directory, **{**MM_KEYS, "mm_vision_tower": str(CLIP_TOWER)})
    return directory


def change(directory: Path, **values: Any) -> None:
    write_json(directory / "config.json", {**read_json(directory / "config.json"), **values})


def its_file(world: World, folder: Path, model: Path) -> Path:
    """PaddleMIX's file with only the paths changed."""
    captions = str(world.data / "captions.json")
    paths: dict[str, Any] = {"model_name_or_path": str(model), "output_dir": str(folder / "out")}
    entry = {"name": "chatml_dataset", "data_files": captions}
    path = folder / "pretrain.json"
    write_json(path, {**ITS_PRETRAIN_FILE, **paths, "dataset": {"train": [entry], "eval": [entry]}})
    return path


def new_names(model: dict[str, Any]) -> set[str]:
    return {name for name in model if name.startswith("projector.")}


def test_paddlemix_own_pretrain_file_runs(
    world: World, vicuna: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(world.data)  # its image paths start from the working directory
    with caplog.at_level("WARNING", logger="paddlemix"):
        assert run_command(pretrain.main, [str(its_file(world, tmp_path, vicuna))]) == 0
    assert f"{vicuna} declares a projector but has no weights for it; a new mlp2x_gelu is initialised" in caplog.text
    result = weights(tmp_path / "out")
    assert len(new_names(result)) == 4
    assert load_pretrained(tmp_path / "out").processor.template.name == "plain"  # type: ignore[union-attr]
    steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in steps if "loss" in line) == 6  # one epoch of six captions


@pytest.mark.parametrize("dry", [False, True])
def test_a_text_model_says_that_the_tower_is_missing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dry: bool
) -> None:
    monkeypatch.chdir(world.data)
    path = its_file(world, tmp_path, world.llama)
    assert run_command(pretrain.main, [str(path), *(["--dry-run"] if dry else [])]) == 2
    found = capsys.readouterr().err
    assert f"error: mm_vision_tower is missing: {world.llama} is a language model alone" in found
    assert not (tmp_path / "out").exists()
    assert run_command(pretrain.main, [str(path), f"mm_vision_tower={CLIP_TOWER}", "max_steps=1"]) == 0


def test_a_freeze_pattern_of_a_text_model_says_it_too(world: World, tmp_path: Path) -> None:
    write_json(tmp_path / "text.json", [{"conversations": [["How many?", "Two."]]}] * 2)
    captions = {"train": [{"data_files": str(tmp_path / "text.json")}]}
    config = world.config(
        tmp_path / "out", model_name_or_path=str(world.llama), dataset=captions, freeze_exclude=["*mm_projector*"]
    )
    with pytest.raises(UserError, match=r"'\*mm_projector\*' matches no parameter .* set mm_vision_tower"):
        run_recipe(config)


def test_elsewhere_a_missing_projector_stays_an_error(world: World, vicuna: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"4 missing: projector\.0\.bias"):
        run_recipe(world.config(tmp_path / "out", model_name_or_path=str(vicuna)))
    with pytest.raises(UserError, match=r"4 missing: projector\.0\.bias"):
        load_pretrained(vicuna)


def test_a_projector_of_which_a_part_is_missing_stays_an_error(world: World, vicuna: Path, tmp_path: Path) -> None:
    run_recipe(run_of(world, vicuna, tmp_path / "whole"))
    whole, part = tmp_path / "whole" / "model.safetensors", tmp_path / "part.safetensors"
    entries = read_weights(tmp_path / "whole")
    write_safetensors(part, {name: entry for name, entry in entries.items() if name != "projector.2.bias"})
    part.replace(whole)
    with pytest.raises(UserError, match=r"1 missing: projector\.2\.bias"):
        run_recipe(run_of(world, tmp_path / "whole", tmp_path / "again"))


def run_of(world: World, model: Path, output_dir: Path, **values: Any) -> Any:
    captions = {"train": [{"data_files": str(world.data / "captions.json")}]}
    given = {"model_name_or_path": str(model), "dataset": captions, "max_steps": 1, **values}
    texts = [f"{key}={json.dumps(value)}" for key, value in world.values(output_dir, **given).items()]
    return load_config(None, texts, DEFAULTS)


def test_a_projector_file_fills_it_in_any_run(world: World, vicuna: Path, tmp_path: Path) -> None:
    run_recipe(run_of(world, vicuna, tmp_path / "first", learning_rate=0.01))
    trained = {name: entry for name, entry in read_weights(tmp_path / "first").items() if name.startswith("projector.")}
    write_safetensors(tmp_path / "projector.safetensors", trained)
    given = {"pretrain_mm_mlp_adapter": str(tmp_path / "projector.safetensors"), "learning_rate": 0.0, "max_steps": 1}
    run_recipe(world.config(tmp_path / "second", model_name_or_path=str(vicuna), **given))
    assert not changed(weights(tmp_path / "first"), weights(tmp_path / "second"))


def test_an_adapter_brings_the_projector_that_was_begun(world: World, vicuna: Path, tmp_path: Path) -> None:
    run_recipe(run_of(world, vicuna, tmp_path / "adapter", vision_tower="lora", lora=True, lora_rank=LORA["lora_rank"]))
    first, second = weights(tmp_path / "adapter"), weights(tmp_path / "adapter")
    assert len(new_names(first)) == 4 and not changed(first, second)
