"""tokenizer_config.json: null is absent, files of transformers 5 are read, and what changes ids is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paddlemix.errors import UserError
from paddlemix.processors.text.tokenizer import load_tokenizer
from tests import tiny_tokenizers

TEXT = "A chat, it's 3"


@pytest.fixture
def vicuna(tmp_path: Path) -> Path:
    tiny_tokenizers.llama(tmp_path)
    return tmp_path


def change(directory: Path, **changes: Any) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_null_is_absent(vicuna: Path) -> None:
    """As AutoProcessor.save_pretrained leaves a file: the first word of a text keeps its leading space."""
    expected = load_tokenizer(vicuna)
    change(vicuna, add_prefix_space=None, add_bos_token=None, sp_model_kwargs=None, use_default_system_prompt=None)
    found = load_tokenizer(vicuna)
    assert found.encode(TEXT) == expected.encode(TEXT)
    assert found.bos_token_id == expected.bos_token_id == 1
    change(vicuna, added_tokens_decoder=None, extra_special_tokens=None, additional_special_tokens=None)
    assert load_tokenizer(vicuna).encode(TEXT) == expected.encode(TEXT)
    change(vicuna, add_prefix_space=False)
    assert load_tokenizer(vicuna).encode(TEXT) != expected.encode(TEXT)


def test_a_missing_file_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_tokenizers.llama(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path)._legacy is False
    assert "has no tokenizer_config.json" in caplog.text and "legacy false" in caplog.text


def test_what_transformers_5_saves(tmp_path: Path) -> None:
    """tokenizer.json alone, extra tokens as a list, and classes that transformers 4 does not have."""
    tiny_tokenizers.mistral_json(tmp_path)
    expected = load_tokenizer(tmp_path)
    roles = {
        key: json.loads((tmp_path / "tokenizer_config.json").read_text())[key] for key in ("bos_token", "eos_token")
    }
    written = {**roles, "add_prefix_space": None, "backend": "tokenizers", "is_local": True, "unk_token": "<unk>"}
    for name in ("LlamaTokenizer", "TokenizersBackend"):
        values = {**written, "tokenizer_class": name, "extra_special_tokens": ["<s>", {"content": "</s>"}]}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
        found = load_tokenizer(tmp_path)
        assert found.encode(TEXT) == expected.encode(TEXT)
        assert (found.eos_token_id, len(found)) == (expected.eos_token_id, len(expected))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"legacy": "false"}, r'tokenizer_config.json: legacy is "false" \(text\); allowed: true or false'),
        ({"sp_model_kwargs": {"enable_sampling": True}}, "sp_model_kwargs is .*; supported: {}"),
        ({"do_lower_case": True}, "do_lower_case is true; supported: false"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, r'added_tokens_decoder\["x"\] is not an id'),
        ({"added_tokens_decoder": {"7": "a"}}, r'added_tokens_decoder\["7"\] is not an id'),
        ({"eos_token": ["</s>"]}, r"eos_token is .* \(a list\); allowed: a text, or an object"),
        ({"tokenizer_class": 3}, "tokenizer_class is 3; allowed: a text"),
    ],
)
def test_a_value_that_is_not_allowed(vicuna: Path, changes: dict[str, Any], message: str) -> None:
    change(vicuna, **changes)
    with pytest.raises(UserError, match=message):
        load_tokenizer(vicuna)


def test_the_smaller_files_are_checked_too(vicuna: Path) -> None:
    (vicuna / "added_tokens.json").write_text('{"[SEG]": "480"}')
    with pytest.raises(UserError, match=r'added_tokens.json: \[SEG\] is "480" \(text\); allowed: a whole number'):
        load_tokenizer(vicuna)
    (vicuna / "added_tokens.json").write_text('{"[SEG]": 480}')
    (vicuna / "special_tokens_map.json").write_text('{"eos_token": 2}')
    with pytest.raises(UserError, match="special_tokens_map.json: eos_token is 2; allowed"):
        load_tokenizer(vicuna)


def test_an_end_after_every_text_is_not_applied(vicuna: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = load_tokenizer(vicuna).encode(TEXT)
    change(vicuna, add_eos_token=True)
    assert load_tokenizer(vicuna).encode(TEXT) == expected
    assert "add_eos_token is not applied" in caplog.text
