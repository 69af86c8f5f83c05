"""NaN and infinity in a weight: found in every type, at every place, by everything that reads or writes weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.checkpoints.files.finite import NotFiniteError, finite, is_finite
from paddlemix.checkpoints.files.tensors import NUMPY_TYPES, array_entry, bfloat16_bits, converted, selected, transposed
from paddlemix.checkpoints.files.weight_files import read_safetensors, write_safetensors
from paddlemix.checkpoints.load import load_pretrained
from paddlemix.examples.llava import run_predict_multiround
from paddlemix.tools import convert_checkpoint, merge_lora_params, predict, quantize, supervised_finetune
from paddlemix.tools.common.command import run_command
from paddlemix.trainer.recipe import run_recipe
from tests.tiny_world import LORA, World

FLOATS = ("F64", "F32", "F16", "BF16")
BAD = (float("nan"), -float("nan"), float("inf"), -float("inf"))


def numbers(values: Any, dtype: str) -> np.ndarray:
    wide = np.asarray(values, dtype=np.float64)
    return bfloat16_bits(wide.astype(np.float32)) if dtype == "BF16" else wide.astype(NUMPY_TYPES[dtype])


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_number_that_is_one(dtype: str) -> None:
    info = np.finfo(np.float32 if dtype == "BF16" else NUMPY_TYPES[dtype])
    most = 3.3895314e38 if dtype == "BF16" else info.max
    assert is_finite(numbers([0.0, -0.0, 1.0, -1.0, most, -most, info.tiny, -info.tiny], dtype), dtype)
    assert is_finite(numbers([], dtype), dtype)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_pattern_of_sixteen_bits(dtype: str) -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    wide = (patterns.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else patterns.view(np.float16)
    found = np.array([is_finite(pattern.view(NUMPY_TYPES[dtype]), dtype) for pattern in patterns.reshape(-1, 1)])
    assert (found == np.isfinite(wide)).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_number_anywhere(dtype: str, bad: float) -> None:
    for size, place in ((1, 0), (7, 6), (3 * 2**18 + 5, 2**18), (3 * 2**18 + 5, 3 * 2**18 + 4)):
        values = np.zeros(size)
        values[place] = bad
        entry = finite(array_entry(numbers(values, dtype), dtype), "'w' of DIR")
        what = "NaN" if np.isnan(bad) else "infinity"
        for read in (entry.read, lambda entry=entry: list(entry.pieces())):
            with pytest.raises(NotFiniteError, match=rf"'w' of DIR holds {what} \(first at element {place:,}\)"):
                read()


def test_integers_are_left_alone() -> None:
    entry = array_entry(np.full(4, -1, dtype=np.int32))
    assert finite(entry, "codes") is entry


@pytest.mark.parametrize(
    "change", [transposed, lambda entry: selected(entry, slice(0, 2), 0), lambda entry: converted(entry, "F16")]
)
def test_the_files_own_name_stays_with_what_is_made_of_a_tensor(change: Callable[[Any], Any]) -> None:
    values = np.ones((3, 4), dtype=np.float32)
    values[1, 2] = np.nan
    named = array_entry(values).__class__("F32", (3, 4), lambda: values, origin="'model.norm' of vicuna")
    with pytest.raises(NotFiniteError, match="'model.norm' of vicuna holds NaN"):
        list(finite(change(named), "ours").pieces())
    turned = finite(transposed(named), "ours")
    assert turned.turned_from is not None
    with pytest.raises(NotFiniteError, match="'model.norm' of vicuna holds NaN"):
        turned.turned_from.read()


def test_what_is_finite_is_read_bit_by_bit() -> None:
    values = np.random.default_rng(0).standard_normal((300, 1000)).astype(np.float32)
    entry = finite(transposed(array_entry(values)), "w")
    assert np.concatenate([piece.copy() for piece in entry.pieces()]).tobytes() == values.T.tobytes()
    assert entry.read().tobytes() == values.T.tobytes()


# ---- commands ----


def broken_copy(directory: Path, target: Path, name: str, bad: float) -> Path:
    """A copy of a model or adapter directory with one bad number in one weight."""
    shutil.copytree(directory, target)
    [path] = [path for path in target.glob("*.safetensors") if name in read_safetensors(path)]
    entries = {key: array_entry(np.array(entry.read()), entry.dtype) for key, entry in read_safetensors(path).items()}
    path.unlink()
    write_safetensors(path, entries)
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    end = json.loads(content[8 : 8 + length])[name]["data_offsets"][1]
    content[8 + length + end - 4 : 8 + length + end] = np.float32(bad).tobytes()
    path.write_bytes(content)
    return target


@pytest.fixture(scope="module")
def adapter(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapter") / "out"
    run_recipe(world.config(out, max_steps=1, **LORA))
    return out


def _calls(world: World, model: Path, folder: Path) -> dict[str, Callable[[], tuple[Any, list[Any]]]]:
    """Commands that read a model."""
    out, questions = folder / "out", folder / "questions.jsonl"
    questions.write_text('{"question_id": 1, "text": "How many?"}\n', encoding="utf-8")

    def train(**values: Any) -> tuple[Any, list[Any]]:
        return supervised_finetune, [world.recipe(folder / "run", **values)]

    return {
        "chat": lambda: (run_predict_multiround, ["--model-path", model, "--image-file", world.picture]),
        "predict": lambda: (predict, ["--model-path", model, "--input", questions, "--output", out]),
        "convert": lambda: (convert_checkpoint, ["--input", model, "--output", out, "--to", "hf"]),
        "quantize": lambda: (quantize, ["--model-path", model, "--output", out, "--kind", "int8"]),
        "finetune": lambda: train(model_name_or_path=str(model)),
        "projector": lambda: train(
            model_name_or_path=str(world.model), pretrain_mm_mlp_adapter=str(_projector(model, folder))
        ),
    }


@pytest.mark.parametrize("command", ["chat", "predict", "convert", "quantize", "finetune", "projector"])
def test_a_model_with_a_bad_weight_is_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    part = "projector." if command == "projector" else "layers.1.mlp.down_proj.weight"
    name = next(key for key in read_safetensors(world.model / "model.safetensors") if part in key)
    model = broken_copy(world.model, tmp_path / "model", name, float("nan"))
    module, arguments = _calls(world, model, tmp_path)[command]()
    assert run_command(module.main, [str(item) for item in arguments]) == 2
    error = capsys.readouterr().err
    assert f"'{name}' of " in error and "holds NaN" in error, error
    assert "Traceback" not in error and not (tmp_path / "out").exists()


def _projector(model: Path, folder: Path) -> Path:
    """The projector's weights as a file of their own, cut out of a model's without looking at them."""
    path = folder / "projector.safetensors"
    entries = read_safetensors(model / "model.safetensors")
    names = [name for name in entries if name.startswith("projector.")]
    header, content = {}, b""
    for name in names:
        values = np.ascontiguousarray(entries[name].read()).tobytes()
        shape = list(entries[name].shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(content), len(content) + len(values)]}
        content += values
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content)
    return path


@pytest.mark.parametrize("part", ["lora_A", "projector."])
def test_an_adapter_with_a_bad_weight_is_refused(
    world: World, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    name = next(key for key in read_safetensors(adapter / "adapter_model.safetensors") if part in key)
    broken = broken_copy(adapter, tmp_path / "broken", name, float("nan"))
    out = tmp_path / "merged"
    arguments = ["--model_name_or_path", world.model, "--lora_path", broken, "--merge_model_path", out]
    assert run_command(merge_lora_params.main, [str(item) for item in arguments]) == 2
    error = capsys.readouterr().err
    assert f"'{name}' of " in error and "holds NaN" in error and not out.exists()
    with pytest.raises(NotFiniteError):
        load_pretrained(broken)
