"""The files that say which rows llava-hf added: what cannot be understood is named, with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.checkpoints.files.weight_files import array_entry, write_json, write_safetensors
from paddlemix.checkpoints.layouts.added_rows import (
    HF_VOCABULARY_FILE,
    choose_vocabulary,
    read_added_tokens,
    read_carried_vocabulary,
)
from paddlemix.errors import UserError

EMBEDDING = "language_model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"3": "a"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"3": {}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}),
        ("tokenizer.json", {"added_tokens": [{"content": "a"}]}),
        ("added_tokens.json", {"a": "b"}),
    ],
)
def test_damaged_added_tokens_are_told(tmp_path: Path, name: str, values: Any) -> None:
    write_json(tmp_path / name, values)
    with pytest.raises(UserError, match=r"the tokenizer of .* cannot be understood .*; copy it again"):
        read_added_tokens(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        ({"image_token": "5"}, EMBEDDING),
        ({"base": "five", "image_token": "5"}, EMBEDDING),
        ({"base": "5", "image_token": "5"}, "model.norm.weight"),
    ],
)
def test_a_damaged_file_of_added_rows_is_told(tmp_path: Path, metadata: dict[str, str], name: str) -> None:
    rows = {name: array_entry(np.zeros((3, 2), np.float32))}
    write_safetensors(tmp_path / HF_VOCABULARY_FILE, rows, metadata)
    with pytest.raises(UserError, match=r"hf_vocabulary.safetensors' cannot be understood .*; copy it again"):
        read_carried_vocabulary(tmp_path, 5)


def test_added_rows_come_back(tmp_path: Path) -> None:
    rows = {EMBEDDING: array_entry(np.ones((3, 2), np.float32))}
    write_safetensors(tmp_path / HF_VOCABULARY_FILE, rows, {"base": "5", "image_token": "6"})
    found = choose_vocabulary(tmp_path, {}, 5)
    assert (found.base, found.image_token, found.size) == (5, 6, 8)
    assert read_carried_vocabulary(tmp_path, 4) is None
