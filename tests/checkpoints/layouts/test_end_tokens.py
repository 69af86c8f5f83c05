"""Which tokens end an answer, and what else generation_config.json says; that all travel is in test_export.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paddlemix.checkpoints.layouts.end_tokens import declared_ends, read_generation
from paddlemix.errors import UserError


def write(directory: Path, **files: dict[str, Any]) -> Path:
    for name, values in files.items():
        path = directory / f"{name}.json"
        before = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**before, **values}))
    return directory


def test_config_json_counts_where_generation_config_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = {"eos_token_id": [5, 6, 5, 10_000, -1]}
    assert declared_ends(config, tmp_path, 100) == [5, 6]
    write(tmp_path, generation_config={"eos_token_id": None, "temperature": 0.9, "do_sample": True, "top_p": 0.6})
    assert declared_ends(config, tmp_path, 100) == [5, 6]
    assert not caplog.records
    write(tmp_path, generation_config={"eos_token_id": 7})
    assert declared_ends(config, tmp_path, 100) == [7]
    assert declared_ends({}, tmp_path / "none", 100) == []


def test_what_would_change_an_answer_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, generation_config={"repetition_penalty": 1.05, "no_repeat_ngram_size": 0, "suppress_tokens": [3]})
    for _ in range(2):
        read_generation(tmp_path)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "repetition_penalty 1.05, suppress_tokens [3] is not applied" in said[0]


@pytest.mark.parametrize("value", ["2", [2, "3"], 1.5, True, {"a": 1}])
def test_an_end_is_a_number(tmp_path: Path, value: Any) -> None:
    write(tmp_path, generation_config={"eos_token_id": value})
    with pytest.raises(UserError, match="generation_config.json: eos_token_id is .*; allowed: a whole number"):
        declared_ends({}, tmp_path, 100)
