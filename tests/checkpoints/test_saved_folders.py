"""Folders that transformers 4.57 and 5 saved: their ids and their logits, from golden files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from paddlemix.checkpoints.convert.export_model import convert_checkpoint
from paddlemix.checkpoints.convert.verify import Conversion
from paddlemix.checkpoints.files.weight_files import read_weights, write_weights
from paddlemix.checkpoints.source import Source
from tests.saved_folders import CASES, check_folder
from tests.tiny_models import GOLDEN

SAVED = GOLDEN.parent / "saved"


@pytest.mark.parametrize("version", ["4.57", "5"])
@pytest.mark.parametrize("case", CASES)
def test_ids_and_logits_are_those_of_transformers(version: str, case: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = SAVED / version / case
    assert json.loads((folder / "expected.json").read_text())["transformers"].startswith(version)
    assert json.loads((folder / "tokenizer_config.json").read_text())["add_prefix_space"] is None
    check_folder(folder)
    said = [record.getMessage() for record in caplog.records if record.name == "paddlemix"]
    assert all(": pictures are padded to squares" in text for text in said) and len(said) <= (case == "llava")  # no key


@pytest.mark.parametrize("version", ["4.57", "5"])
def test_a_conversion_there_and_back_is_read_alike(tmp_path: Path, version: str) -> None:
    source = SAVED / version / "llava_next"
    convert_checkpoint(source, tmp_path / "ours", Conversion(to="paddlemix"))
    convert_checkpoint(tmp_path / "ours", tmp_path / "hf", Conversion(to="hf"))
    for name in ("expected.json", "expected.npz"):
        shutil.copy(source / name, tmp_path / "hf")
    check_folder(tmp_path / "hf")


def test_a_tower_of_transformers_5_has_names_without_prefix(tmp_path: Path) -> None:
    tower = GOLDEN / "llava_v15_llama" / "original" / "vision_tower"
    shutil.copy(tower / "config.json", tmp_path)
    renamed = {name.removeprefix("vision_model."): entry for name, entry in read_weights(tower).items()}
    write_weights(tmp_path, renamed, 10**9)
    found, wanted = Source.open(tmp_path).tensors(), Source.open(tower).tensors()
    assert found.keys() == wanted.keys()
    assert all((found[name].read() == wanted[name].read()).all() for name in wanted)
