"""Digests of weights: equal for the same model however it is stored, different for one changed bit, made once."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix import identity
from paddlemix.cached_table import CachedTable
from paddlemix.checkpoints.convert.export_model import convert_checkpoint
from paddlemix.checkpoints.convert.verify import Conversion
from paddlemix.checkpoints.files.tensors import array_entry
from paddlemix.checkpoints.files.weight_files import read_json, read_safetensors, write_json
from paddlemix.checkpoints.identity import weight_identity
from paddlemix.checkpoints.identity.weight_identity import ORIGIN_FILE, differing, source_digests, tensor_digests
from paddlemix.checkpoints.source import open_source
from paddlemix.errors import UserError
from paddlemix.tools import quantize
from paddlemix.tools.common.command import run_command
from tests.tiny_models import GOLDEN, flip_bit

V15, V16 = GOLDEN / "llava_v15_llama" / "original", GOLDEN / "llava_v16_llama" / "original"


@pytest.fixture(autouse=True)
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the tensors that were hashed; an empty cache; files count as settled at once."""
    monkeypatch.setenv("PADDLEMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weight_identity, "_TABLE", CachedTable(weight_identity._TABLE._layout))
    monkeypatch.setattr(identity, "_GRANULARITY_NS", -(10**12))
    names: list[str] = []
    original = weight_identity._digest

    def spy(name: str, entry: Any) -> str:
        names.append(name)
        return original(name, entry)

    monkeypatch.setattr(weight_identity, "_digest", spy)
    yield names


def digests(directory: Path) -> dict[str, str]:
    return source_digests(open_source(directory))


def convert(source: Path, target: Path, **options: Any) -> Path:
    convert_checkpoint(source, target, Conversion(**options))
    return target


@pytest.mark.parametrize("model", [V15, V16], ids=["1.5", "1.6"])
def test_every_layout_and_every_wider_type_has_the_same(tmp_path: Path, model: Path) -> None:
    expected = digests(model)
    assert len(set(expected.values())) > 30
    for to in ("paddlemix", "hf", "llava"):
        assert digests(convert(model, tmp_path / to, to=to)) == expected
        wide = convert(tmp_path / to, tmp_path / f"{to}-wide", to=to, dtype="float32")
        (wide / ORIGIN_FILE).unlink()
        assert digests(wide) == expected


def test_types() -> None:
    exact = np.array([[1.5, -0.0], [float("inf"), 2.0**-20]], np.float32)
    both = tensor_digests({"a": array_entry(exact), "b": array_entry(exact.astype(np.float16))})
    bits = array_entry((exact.view(np.uint32) >> 16).astype(np.uint16), "BF16")
    assert both["a"] == both["b"] == tensor_digests({"b": bits})["b"]
    for other in (-exact, exact.T, exact.reshape(4), exact + np.float32(2**-23)):
        assert tensor_digests({"a": array_entry(np.ascontiguousarray(other))})["a"] != both["a"]
    half = np.array([1 + 2**-10, 65504], np.float16)  # has more digits than bfloat16
    assert tensor_digests({"a": array_entry(half)}) == tensor_digests({"a": array_entry(half.astype(np.float32))})
    large = np.array([70000.0, 1 + 2**-10], np.float32)  # float16 has no such number
    assert tensor_digests({"a": array_entry(large)}) != tensor_digests({"a": array_entry(-large)})


NAMES = (
    "language_model.layers.1.self_attn.q_proj.weight",
    "language_model.layers.0.mlp.down_proj.weight",
    "language_model.embed_tokens.weight",
    "lm_head.weight",
    "projector.0.bias",
    "vision_tower.layers.0.mlp.fc1.weight",
)


def test_one_bit_anywhere(tmp_path: Path) -> None:
    model = convert(V15, tmp_path / "model", to="paddlemix")
    before = digests(model)
    for number, name in enumerate(NAMES):
        flip_bit(model, name, 0 if number % 2 else -1)
        now = digests(model)
        assert differing(before, now, before.keys()) == ([name], True)
        before = now


def test_made_once(tmp_path: Path, made: list[str]) -> None:
    model = convert(V15, tmp_path / "model", to="paddlemix")
    expected = digests(model)
    count = len(made)
    assert sorted(made) == sorted(expected)
    assert digests(model) == expected and len(made) == count
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert digests(model) == expected and len(made) == 2 * count  # touched
    shutil.copytree(model, tmp_path / "copy")
    assert digests(tmp_path / "copy") == expected and len(made) == 3 * count


@pytest.mark.parametrize("change", ["digests = '{}'", "digests = x'00'", "checksum = ''"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, made: list[str], change: str) -> None:
    expected = digests(V15)
    with sqlite3.connect(tmp_path / "cache" / "digests" / "weights-1.sqlite3") as database:
        database.execute(f"UPDATE facts SET {change}")
    database.close()
    assert digests(V15) == expected and len(made) == 2 * len(expected)


def test_a_rounded_copy_knows_what_it_was_made_of(tmp_path: Path) -> None:
    expected = digests(V15)
    for to in ("paddlemix", "llava", "hf"):
        rounded = convert(V15, tmp_path / to, to=to, dtype="bfloat16")
        assert digests(rounded) == expected
        assert digests(convert(rounded, tmp_path / f"{to}-again", to="paddlemix", dtype="float32")) == expected
        assert digests(convert(rounded, tmp_path / f"{to}-as-it-is", to="paddlemix")) == expected
    flip_bit(tmp_path / "paddlemix", NAMES[0])
    assert differing(expected, digests(tmp_path / "paddlemix"), expected.keys()) == ([NAMES[0]], True)
    (tmp_path / "llava" / ORIGIN_FILE).unlink()
    assert len(differing(expected, digests(tmp_path / "llava"), expected.keys())[0]) > 20


@pytest.mark.parametrize("kind", ["int8", "nf4", "float16"])
def test_a_quantised_copy_knows_what_it_was_made_of(tmp_path: Path, kind: str) -> None:
    arguments = ["--model-path", str(V15), "--output", str(tmp_path / kind), "--kind", kind]
    assert run_command(quantize.main, arguments) == 0
    expected, quantised = digests(V15), tmp_path / kind
    assert digests(quantised) == expected
    codes = sorted(name for name in read_safetensors(quantised / "model.safetensors") if ".q_proj.weight_" in name)
    flip_bit(quantised, codes[0])
    wrong = codes[0].partition(".weight_")[0] + ".weight"
    assert differing(expected, digests(quantised), expected.keys()) == ([wrong], True)
    (quantised / ORIGIN_FILE).unlink()
    names = {name for name in expected if not name.endswith("_proj.weight")}
    assert differing(expected, digests(quantised), names) == ([], True)
    assert differing(expected, digests(quantised), expected.keys()) == ([], False)


def test_a_damaged_origin_is_told(tmp_path: Path) -> None:
    rounded = convert(V15, tmp_path / "rounded", to="paddlemix", dtype="bfloat16")
    values = read_json(rounded / ORIGIN_FILE)
    write_json(rounded / ORIGIN_FILE, {**values, "origin": 3})
    with pytest.raises(UserError, match=r"origin\.json' cannot be understood .* copy it again, or remove it"):
        digests(rounded)
