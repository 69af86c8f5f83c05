"""Tokens that llava-hf added, taken out of and declared in tokenizer files that list none."""

from __future__ import annotations

from pathlib import Path

import pytest

from paddlemix.checkpoints.convert.tokenizer_files import declare_added_tokens, remove_added_tokens
from paddlemix.checkpoints.files.weight_files import read_json, write_json

IMAGE = {"id": 32000, "content": "<image>", "special": True}
END = {"id": 2, "content": "</s>", "special": True}


@pytest.mark.parametrize(("added", "kept"), [({}, []), ({"added_tokens": None}, []), ({"added_tokens": [END]}, [END])])
def test_a_tokenizer_without_added_tokens_loses_none(tmp_path: Path, added: dict, kept: list) -> None:
    write_json(tmp_path / "tokenizer.json", {"version": "1.0", **added})
    remove_added_tokens(tmp_path, 32000)
    assert read_json(tmp_path / "tokenizer.json") == {"version": "1.0", "added_tokens": kept}


def test_added_tokens_are_removed_from_their_id_on(tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer.json", {"added_tokens": [END, IMAGE], "padding": {"pad_token": "<image>"}})
    write_json(tmp_path / "special_tokens_map.json", {"pad_token": "<image>", "unk_token": "<unk>"})
    remove_added_tokens(tmp_path, 32000)
    assert read_json(tmp_path / "tokenizer.json") == {"added_tokens": [END], "padding": None}
    assert read_json(tmp_path / "special_tokens_map.json") == {"unk_token": "<unk>", "pad_token": "<unk>"}


def test_tokens_are_declared_where_a_tokenizer_lists_none(tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer.json", {})
    declare_added_tokens(tmp_path, 32000)
    found = read_json(tmp_path / "tokenizer.json")["added_tokens"]
    assert [(token["id"], token["content"]) for token in found] == [(32000, "<image>"), (32001, "<pad>")]
