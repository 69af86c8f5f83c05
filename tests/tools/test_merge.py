"""Merging: the merged model answers like the adapter, and nothing that is not its own is touched."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from paddlemix.checkpoints.adapters.adapter import AdapterSettings, fingerprint
from paddlemix.checkpoints.adapters.base_places import base_reference
from paddlemix.checkpoints.adapters.merging import write_merged
from paddlemix.checkpoints.base_model import BaseSpec
from paddlemix.checkpoints.files.weight_files import read_json, read_weights
from paddlemix.checkpoints.load import load_base, load_pretrained
from paddlemix.checkpoints.pretrained import save_model
from paddlemix.errors import UserError
from paddlemix.peft.linear import LoRALinear
from paddlemix.peft.lora import LoRAConfig, add_lora
from paddlemix.peft.quantize import quantized_linears
from paddlemix.tools import merge_lora_params
from paddlemix.tools.common.command import run_command
from paddlemix.trainer.recipe import run_recipe
from tests.tiny_models import save_adapter
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
    said = capsys.readouterr().out
    assert said.startswith(f"merged {adapter} into {tmp_path / 'merged'}: 14 layers; logits of an example differ by at")
    assert said.count("\n") == 1
    assert np.abs(logits(tmp_path / "merged") - logits(adapter)).max() < MAX_GAP
    assert np.abs(logits(adapter) - logits(world.model)).max() > 100 * MAX_GAP
    merged = load_pretrained(tmp_path / "merged")
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


def test_without_a_place_the_adapter_becomes_the_model_and_its_run_stays(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = world.config(tmp_path / "run", save_strategy="steps", save_steps=2, learning_rate=0.01, **LORA)
    run_recipe(config)
    before = logits(tmp_path / "run")
    assert merge("--lora_path", tmp_path / "run" / "checkpoint-4") == 2
    assert "is a checkpoint, from which its run could not resume after a merge in place" in capsys.readouterr().err
    assert merge("--lora_path", tmp_path / "run") == 0
    assert load_pretrained(tmp_path / "run").adapter is None
    assert np.abs(logits(tmp_path / "run") - before).max() < MAX_GAP
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"metrics.jsonl", "loss.png", "run_config.json", "checkpoint-2", "checkpoint-4"} <= names
    assert load_pretrained(tmp_path / "run" / "checkpoint-4").adapter is not None
    assert names.isdisjoint({"lora_config.json", "adapter_model.safetensors"})
    assert np.array_equal(logits(tmp_path / "run" / "adapter"), before)  # nothing is lost
    assert merge("--lora_path", tmp_path / "run" / "adapter", "--merge_model_path", tmp_path / "again") == 0
    with pytest.raises(UserError, match=r"run' holds a whole model \(config.json\), which the adapter of this"):
        run_recipe(config)
    assert names == {path.name for path in (tmp_path / "run").iterdir()}


def test_a_place_that_is_taken_keeps_the_adapter_where_it_is(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(adapter, tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(LoRALinear, "merged_weight", LoRALinear.base_weight)  # the result answers otherwise
        assert merge("--lora_path", tmp_path / "run") == 2
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    (tmp_path / "run" / "adapter").mkdir()
    assert merge("--lora_path", tmp_path / "run") == 2
    assert "run/adapter', where the adapter would move, exists" in capsys.readouterr().err


def test_other_files_in_the_target_stay(adapter: Path, tmp_path: Path) -> None:
    for name in ("notes.txt", "model.safetensors.index.json", "model-00001-of-00002.safetensors"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    assert merge("--lora_path", adapter, "--merge_model_path", tmp_path) == 2  # a model is there already
    assert len(list(tmp_path.iterdir())) == 3
    assert merge("--lora_path", adapter, "--merge_model_path", tmp_path, "--overwrite") == 0
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
    loaded = load_pretrained(tmp_path / "merged")
    assert loaded.model.config.vision is not None and loaded.unused
    before, after = weights(tmp_path / "run"), weights(tmp_path / "merged")
    plain = {name for name in after if not name.endswith(("lora_A", "lora_B"))}
    same = plain - changed({name: before[name] for name in plain}, {name: after[name] for name in plain})
    assert {name for name in plain if name.startswith(("vision_tower.", "projector."))} <= same


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"pissa": True},
    "tower": {"vision_tower": "lora", "lora_bias": "lora_only"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_from_a_base_of_every_storage(world: World, tmp_path: Path, kind: str) -> None:
    """A base in bfloat16 is held as it is stored; the result is computed in float32 all the same."""
    base = tmp_path / "base"
    loaded = load_pretrained(world.model)
    loaded.model.to(dtype="bfloat16")
    save_model(loaded, base)
    values = {**LORA, **KINDS[kind], "learning_rate": 0.02, "model_name_or_path": str(base)}
    run_recipe(world.config(tmp_path / "adapter", **values))
    assert merge("--lora_path", tmp_path / "adapter", "--merge_model_path", tmp_path / "merged") == 0
    assert np.abs(logits(tmp_path / "merged") - logits(tmp_path / "adapter")).max() < MAX_GAP


@pytest.mark.parametrize("kind", ["int8", "nf4", "int8 directory"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantised_base_gives_a_plain_model(world: World, tmp_path: Path, kind: str, dtype: str) -> None:
    """One whose config.json says so, or one that was coded while it was read; layers without adapter become plain
    too."""
    spec = BaseSpec(model=str(world.model), quantize=kind.split()[0])
    if "directory" in kind:
        save_model(load_base(spec), tmp_path / "base")
        spec = BaseSpec(model=str(tmp_path / "base"))
    loaded = load_base(spec)
    paddle.seed(0)
    mark, names = fingerprint(loaded.model), sorted(quantized_linears(loaded.model))
    adapter = LoRAConfig(r=2, modules=tuple(name for name in names if "q_proj" in name))
    add_lora(loaded.model, adapter)
    for name, weight in loaded.model.named_parameters():
        weight.stop_gradient = "lora" not in name
        if name.endswith("lora_B"):
            weight.set_value(paddle.randn(weight.shape) * 0.3)
    settings = AdapterSettings(adapter, base_reference(spec, tmp_path / "adapter"), mark)
    save_adapter(loaded.model, loaded.processor, settings, tmp_path / "adapter")
    arguments = ("--lora_path", tmp_path / "adapter", "--merge_model_path", tmp_path / "merged", "--dtype", dtype)
    assert merge(*arguments) == 0
    assert "quantization_config" not in read_json(tmp_path / "merged" / "config.json")
    entries = read_weights(tmp_path / "merged")
    assert entries.keys() == read_weights(world.model).keys()
    assert {entry.dtype for entry in entries.values()} == {{"float32": "F32", "bfloat16": "BF16"}[dtype]}
    gap = np.abs(logits(tmp_path / "merged") - logits(tmp_path / "adapter")).max()
    assert gap < (10 * MAX_GAP if dtype == "float32" else 0.5)


def test_a_result_that_answers_otherwise_is_not_kept(
    world: World, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LoRALinear, "merged_weight", LoRALinear.base_weight)  # forgets the update
    assert merge("--lora_path", adapter, "--merge_model_path", tmp_path / "merged") == 2
    error = capsys.readouterr().err
    assert "the merged model does not answer like the adapter: logits of an example differ by at most" in error
    assert "float32 allows" in error and "Nothing was written" in error
    assert not list((tmp_path / "merged").glob("*"))


def test_it_is_self_contained_and_in_shards(adapter: Path, tmp_path: Path) -> None:
    loaded = load_pretrained(adapter)
    (tmp_path / "merged").mkdir()
    assert write_merged(loaded, tmp_path / "merged", "float32", 100_000) == 14
    assert loaded.adapter is not None  # what is in memory stays as it was
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    moved = tmp_path / "elsewhere"
    shutil.move(tmp_path / "merged", moved)
    assert np.abs(logits(moved) - logits(adapter)).max() < MAX_GAP


@pytest.mark.parametrize("case", ["model", "missing", "other base", "into base"])
def test_what_cannot_be_merged(
    world: World, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    target = tmp_path / "merged"
    if case == "other base":
        run_recipe(world.config(tmp_path / "tuned", learning_rate=0.1))
    arguments, message = {
        "model": (("--lora_path", world.model), "is not an adapter directory: no lora_config.json"),
        "missing": (("--lora_path", tmp_path / "none"), "is not an adapter directory"),
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
