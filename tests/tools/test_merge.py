"""Merging: the merged model answers like the adapter, and nothing that is not its own is touched."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest

from paddlemix.checkpoints.files import read_weights
from paddlemix.checkpoints.load import load_pretrained
from paddlemix.checkpoints.pretrained import load_model
from paddlemix.tools import merge_lora_params
from paddlemix.tools._command import run_command
from paddlemix.trainer.recipe import run_recipe
from tests.tiny_world import CLIP_TOWER, LORA, MAX_GAP, World, changed, weights


def merge(*arguments: str | Path) -> int:
    return run_command(merge_lora_params.main, [str(argument) for argument in arguments])


def logits(directory: Path) -> np.ndarray:
    """Of a row with an image's patches in the middle."""
    loaded = load_pretrained(directory)
    pixels = np.random.RandomState(0).randn(1, 3, 28, 28).astype("float32")
    index = [0, 7, 8, 9, 10, 5, 6]
    with paddle.no_grad():
        hidden = loaded.model(
            paddle.to_tensor([[1, 0, 0, 0, 0, 9, 7]]),
            paddle.arange(7).unsqueeze(0),
            None,
            paddle.to_tensor(pixels),
            paddle.to_tensor(index),
        )
        return loaded.model.logits(hidden).numpy()


def test_merged_equals_unmerged(
    world: World, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge("--lora_path", adapter, "--merge_model_path", tmp_path / "merged") == 0
    assert capsys.readouterr().out == f"merged 14 layers of {adapter} into {tmp_path / 'merged'}\n"
    assert np.abs(logits(tmp_path / "merged") - logits(adapter)).max() < MAX_GAP
    assert np.abs(logits(adapter) - logits(world.model)).max() > 100 * MAX_GAP
    merged = load_model(tmp_path / "merged")
    assert merged.adapter is None and merged.processor is not None
    one, other = weights(tmp_path / "merged"), weights(adapter)
    for name in one:  # a projector that was trained whole is taken over bit for bit
        if name.startswith("projector."):
            assert one[name].tobytes() == other[name].tobytes()


def test_it_needs_no_base_beside_it(world: World, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(world.model, tmp_path / "base")
    arguments = ("--model_name_or_path", tmp_path / "base", "--lora_path", adapter, "--merge_model_path")
    assert merge(*arguments, tmp_path / "merged") == 0
    before = logits(tmp_path / "merged")
    shutil.rmtree(tmp_path / "base")
    assert np.array_equal(logits(tmp_path / "merged"), before)


def test_without_a_place_the_adapter_becomes_the_model_and_its_run_stays(world: World, tmp_path: Path) -> None:
    run_recipe(world.config(tmp_path / "run", save_strategy="steps", save_steps=2, learning_rate=0.01, **LORA))
    before = logits(tmp_path / "run")
    assert merge("--lora_path", tmp_path / "run") == 0
    assert load_model(tmp_path / "run").adapter is None
    assert np.abs(logits(tmp_path / "run") - before).max() < MAX_GAP
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"metrics.jsonl", "loss.png", "run_config.json", "checkpoint-2", "checkpoint-4"} <= names
    assert load_pretrained(tmp_path / "run" / "checkpoint-4").adapter is not None


def test_other_files_in_the_target_stay(adapter: Path, tmp_path: Path) -> None:
    for name in ("notes.txt", "model.safetensors.index.json", "model-00001-of-00002.safetensors"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    assert merge("--lora_path", adapter, "--merge_model_path", tmp_path) == 0
    assert (tmp_path / "notes.txt").exists() and not (tmp_path / "model.safetensors.index.json").exists()
    assert np.abs(logits(tmp_path) - logits(adapter)).max() < MAX_GAP


def test_half_precision_on_disk(adapter: Path, tmp_path: Path) -> None:
    for dtype, name in (("float16", "F16"), ("bfloat16", "BF16")):
        assert merge("--lora_path", adapter, "--merge_model_path", tmp_path / dtype, "--dtype", dtype) == 0
        assert {entry.dtype for entry in read_weights(tmp_path / dtype).values()} == {name}
        assert np.abs(logits(tmp_path / dtype) - logits(adapter)).max() < 0.5


def test_an_adapter_on_parts_keeps_its_tower(world: World, tmp_path: Path) -> None:
    parts = {"model_name_or_path": str(world.llama), "mm_vision_tower": str(CLIP_TOWER), "learning_rate": 0.01}
    run_recipe(world.config(tmp_path / "run", **parts, **LORA))
    arguments = ("--lora_path", tmp_path / "run", "--merge_model_path")
    assert merge("--model_name_or_path", world.llama, *arguments, tmp_path / "merged") == 0
    loaded = load_model(tmp_path / "merged")
    assert loaded.model.config.vision is not None and loaded.unused
    before, after = weights(tmp_path / "run"), weights(tmp_path / "merged")
    plain = {name for name in after if not name.endswith(("lora_A", "lora_B"))}
    same = plain - changed({name: before[name] for name in plain}, {name: after[name] for name in plain})
    assert {name for name in plain if name.startswith(("vision_tower.", "projector."))} <= same


@pytest.mark.parametrize("case", ["model", "missing", "other base", "into base"])
def test_what_cannot_be_merged(
    world: World, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    target = tmp_path / "merged"
    if case == "other base":
        run_recipe(world.config(tmp_path / "tuned", learning_rate=0.1))
    arguments, message = {
        "model": (("--lora_path", world.model), "is no adapter directory: no lora_config.json"),
        "missing": (("--lora_path", tmp_path / "none"), "is no adapter directory"),
        "other base": (
            ("--lora_path", adapter, "--model_name_or_path", tmp_path / "tuned"),
            "was trained on another base than",
        ),
        "into base": (("--lora_path", adapter, "--merge_model_path", world.model), "is the base model"),
    }[case]
    given = arguments if case == "into base" else (*arguments, "--merge_model_path", target)
    assert merge(*given) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and captured.out == ""
    assert not target.exists()
    assert load_pretrained(world.model).adapter is None
