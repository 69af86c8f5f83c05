"""`--dry-run` as it is typed: what it says, that it needs no weights, and that nothing is left behind."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paddlemix.dry_run import report
from paddlemix.dry_run.device import DeviceMemory
from paddlemix.errors import cut
from paddlemix.examples.llava import pretrain
from paddlemix.tools import supervised_finetune
from paddlemix.tools.common.command import run_command
from tests.tiny_world import World


@pytest.fixture(autouse=True)
def _without_the_libraries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What they take is asked for in tests of its own; loading them takes seconds."""
    monkeypatch.setattr("paddlemix.dry_run.plan.program_bytes", lambda on_cpu: 2**20)
    yield


def dry_run(path: Path, capsys: pytest.CaptureFixture[str], *arguments: str, command: Any = supervised_finetune) -> str:
    """The report of a run that nothing is wrong with."""
    assert run_command(command.main, [str(path), "--dry-run", *arguments]) == 0
    return capsys.readouterr().out


def test_a_run_is_told_before_it_is_made(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = world.recipe(tmp_path, max_steps=-1, num_train_epochs=3, gradient_accumulation_steps=2)
    text = dry_run(recipe, capsys)
    assert f"model: {world.model}; float32 weights, computed in float32" in text
    for part in ("vision_tower", "projector", "language_model"):
        assert sum(line.strip().startswith(part) for line in text.splitlines()) == 2  # numbers, memory
    assert "12 samples of" in text and "image tokens" in text
    assert "largest batch: 2 x" in text
    assert "steps: 9, 3.00 epochs of 3 steps; a step is 4 rows (2 x 2 passes x 1 device)" in text
    assert "memory of each cpu, MiB:" in text and "it fits: about" in text
    assert not (tmp_path / "out").exists()


def test_no_weight_is_read(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(world.model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    whole = dry_run(world.recipe(tmp_path), capsys)
    without = dry_run(world.recipe(tmp_path, model_name_or_path=str(bare)), capsys)
    assert without.replace(str(bare), str(world.model)).splitlines()[:-1] == whole.splitlines()[:-1]
    for path in bare.iterdir():
        if path.name.startswith("tokenizer"):
            path.unlink()
    assumed = dry_run(world.recipe(tmp_path, model_name_or_path=str(bare)), capsys)
    assert "largest batch: 2 x 256 positions" in assumed and "rows of max_length" in assumed


def test_pretraining_trains_the_projector(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = {"train": [{"data_files": str(world.data / "captions.json")}]}
    keys = {"model_name_or_path": str(world.llama), "dataset": dataset, "image_root": str(world.data)}
    recipe = world.recipe(tmp_path, **keys, mm_vision_tower="openai/clip-vit-large-patch14", max_length=300)
    lines = dry_run(recipe, capsys, command=pretrain).splitlines()
    assert any("vision_tower" in line and line.endswith("frozen") for line in lines)
    assert any("language_model" in line and line.endswith("frozen") for line in lines)
    assert any("projector" in line and "trained" in line for line in lines)
    assert any("6 samples of" in line for line in lines)


def test_packed_rows_and_devices(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = world.recipe(tmp_path, mixtoken=True, max_length=200, per_device_train_batch_size=1, max_steps=2)
    assert "largest batch: 1 x 2" not in dry_run(recipe, capsys)  # two hundred are the most, and one row is fuller
    text = dry_run(recipe, capsys, "--devices", "2", "sharding=stage1")
    assert "a step is 2 rows (1 x 1 passes x 2 devices)" in text and "sharding stage1" in text
    again = dry_run(recipe, capsys, "sharding=stage1", "--devices=2")
    assert again.splitlines()[:-1] == text.splitlines()[:-1]  # what is free changes from moment to moment


@pytest.mark.parametrize("value", ["0", "two", "", "9" * 5000])
def test_devices_are_a_number(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str) -> None:
    recipe = world.recipe(tmp_path)
    assert run_command(supervised_finetune.main, [str(recipe), "--dry-run", f"--devices={value}"]) == 2
    assert f"--devices '{cut(value, 40)}' is not a number of devices; give 1 or more" in capsys.readouterr().err


def test_what_does_not_fit_is_a_warning(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "device_memory", lambda kind: DeviceMemory(total=2**20, free=2**19))
    text = dry_run(world.recipe(tmp_path), capsys)
    assert "warning: it does not fit: about" in text and "512.0 KiB are free (of 1.0 MiB)" in text
    assert "recompute false -> true" in text and "lora false -> true" in text
    text = dry_run(world.recipe(tmp_path, lora=True, recompute=True, per_device_train_batch_size=1), capsys)
    assert "recompute" not in text.partition("To need less")[2] and 'quantize_base null -> "nf4"' in text


def test_a_device_that_is_not_here(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = world.recipe(tmp_path)
    text = dry_run(recipe, capsys, "device=npu", "bf16=true", "fp16_opt_level=O2")
    assert "memory of each npu" in text and "device 'npu' is not available here" in text and "is not known" in text
    assert "bfloat16 weights, computed in bfloat16" in text
    assert "cannot be computed on CPU" in dry_run(recipe, capsys, "device=cpu", "bf16=true")


def test_what_a_run_would_refuse_is_refused(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for changes, message in (
        ({"do_train": False, "do_eval": True}, "do_train is false"),
        ({"gradient_accumulation_steps": 50}, "a step needs 100 rows"),
        ({"lora": True, "lora_target_modules": ["nothing"]}, "'nothing' matches no linear layer"),
        ({"model_name_or_path": "someone/model"}, "its sizes are not known"),
    ):
        recipe = world.recipe(tmp_path, **changes)
        assert run_command(supervised_finetune.main, [str(recipe), "--dry-run"]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
