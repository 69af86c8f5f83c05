"""The files that say which rows llava-hf added: what cannot be understood is named, with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.checkpoints.files.tensors import array_entry
from paddlemix.checkpoints.files.weight_files import write_json, write_safetensors
from paddlemix.checkpoints.layouts.added_rows import (
    HF_VOCABULARY_FILE,
    choose_vocabulary,
    read_added_tokens,
    read_carried_vocabulary,
    split_added_rows,
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


@pytest.mark.parametrize(
    ("pieces", "image", "vocab_size", "base"),
    [
        (40, 40, 64, 40),  # as llava-1.5-7b-hf: 32000 pieces, `<image>`, `<pad>`, and padding to 32064
        (62, 62, 64, 62),
        (39, 40, 64, 40),
        (40, 40, 41, 40),
        (40, 40, 65, 65),  # more than padding
        (41, 40, 64, 64),  # `<image>` is a piece of the tokenizer
    ],
)
def test_the_tokenizer_tells_what_was_added(
    tmp_path: Path, pieces: int, image: int, vocab_size: int, base: int
) -> None:
    write_json(tmp_path / "vocab.json", {str(number): number for number in range(pieces)})
    write_json(tmp_path / "added_tokens.json", {"<image>": image, "<pad>": image + 1})
    _, found = split_added_rows({"image_token_index": image}, tmp_path, {}, vocab_size)
    assert (found.base, found.image_token) == (base, image)


def test_added_rows_come_back(tmp_path: Path) -> None:
    rows = {EMBEDDING: array_entry(np.ones((3, 2), np.float32))}
    write_safetensors(tmp_path / HF_VOCABULARY_FILE, rows, {"base": "5", "image_token": "6"})
    found = choose_vocabulary(tmp_path, {}, 5)
    assert (found.base, found.image_token, found.size) == (5, 6, 8)
    assert read_carried_vocabulary(tmp_path, 4) is None
