"""Data of the user's own: where references come from, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paddlemix.errors import UserError
from paddlemix.evaluation.benchmarks.benchmark import BenchmarkData, Request
from paddlemix.evaluation.benchmarks.own_data import custom_benchmark
from tests.evaluation.benchmarks.tiny_benchmarks import write_lines


def read(path: Path, *records: dict[str, Any]) -> BenchmarkData:
    write_lines(path, list(records))
    return custom_benchmark(path, None, ["exact_match"]).read(Request(folder=Path()))


def test_references_of_every_form(tmp_path: Path) -> None:
    pair = {"conversations": [["<image>\nWhat?", "A cat."]], "image": "a.png"}
    data = read(
        tmp_path / "q.jsonl",
        pair,
        {"question_id": "x", "text": "Q", "references": ["a", 7], "category": 3},
        {"question_id": "y", "text": "Q", "answers": [{"answer": "b"}, {"answer": "c"}]},
        {"id": "z", "text": "Q", "reference": "d"},
    )
    first, *others = data.questions
    # a conversation's own answer is known once it is written as the model's are
    assert first.record == {} and first.question_id == 0 and first.text == "What?" and first.images == ("a.png",)
    line = {"question_id": 0, "prompt": "", "text": "cat", "reference": "A cat."}
    assert first.answered(line).record == {"reference": "A cat."}
    assert first.line() == pair
    assert [one.record["references"] for one in others] == [["a", "7"], ["b", "c"], ["d"]]
    assert [one.question_id for one in others] == ["x", "y", "z"] and others[0].category == "3"


def test_what_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    with pytest.raises(UserError, match="q.jsonl record 0 has no reference"):
        read(path, {"question_id": 1, "text": "Q"})
    with pytest.raises(UserError, match="record 0: its references are not texts"):
        read(path, {"question_id": 1, "text": "Q", "references": [["a"]]})
    with pytest.raises(UserError, match="record 1: neither a question"):
        read(path, {"text": "Q", "references": ["a"]}, {"question": "Q"})
    with pytest.raises(UserError, match="metric 'exactmatch' is not one of exact_match.*did you mean 'exact_match'"):
        custom_benchmark(path, None, ["exactmatch"])
