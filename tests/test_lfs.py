"""A pointer of git-lfs is told wherever a file is opened: weights, tokenizers, declared files, data, tables, images."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from paddlemix.datasets.forms.vqa_table import Columns, read_table
from paddlemix.datasets.images.decode import load_image
from paddlemix.datasets.records.record_file import open_records
from paddlemix.errors import UserError
from paddlemix.json_files import read_object
from paddlemix.lfs import refuse_pointer
from paddlemix.processors.text.tokenizer import load_tokenizer
from tests.tiny_models import GOLDEN

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 499723\n".encode()


def _safetensors(path: Path) -> object:
    from paddlemix.checkpoints.files.weight_files import read_safetensors

    return read_safetensors(path)


def _torch(path: Path) -> object:
    from paddlemix.checkpoints.files.pickles import read_torch

    return read_torch(path)


READERS: dict[str, Callable[[Path], object]] = {
    "model.safetensors": _safetensors,
    "pytorch_model.bin": _torch,
    "config.json": read_object,
    "train.json": open_records,
    "train.jsonl": open_records,
    "train.csv": lambda path: list(read_table(path, Columns())),
    "image.jpg": load_image,
}


@pytest.mark.parametrize("name", READERS)
def test_a_pointer_is_told(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(POINTER)
    with pytest.raises(UserError, match=f"{name}' is a git-lfs pointer, not the file itself; run `git lfs pull`"):
        READERS[name](path)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"])
def test_a_pointer_among_tokenizer_files_is_told(tmp_path: Path, name: str) -> None:
    shutil.copytree(GOLDEN.parent / "conversations_tiny" / "tokenizer", tmp_path / "t")
    (tmp_path / "t" / name).write_bytes(POINTER)
    with pytest.raises(UserError, match=f"{name}' is a git-lfs pointer"):
        load_tokenizer(tmp_path / "t")


def test_what_is_no_pointer_passes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"version 1")
    (tmp_path / "b").write_bytes(POINTER + bytes(1024))  # longer than any pointer
    for name in ("a", "b", "absent", "."):
        refuse_pointer(tmp_path / name, name)
