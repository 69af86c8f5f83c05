"""`result.json` of several runs, and its table with what papers print."""

from __future__ import annotations

from pathlib import Path

import pytest

from paddlemix.errors import UserError
from paddlemix.evaluation.benchmarks.published_scores import published_score
from paddlemix.evaluation.result_file import Result, add_result, read_results
from paddlemix.evaluation.score_table import score_table

POPE = Result(
    protocol="llava",
    metrics={"accuracy": 0.871, "f1": 0.8593},
    headline="f1",
    questions=8910,
    limit=None,
    published_questions=(8910,),
    published=85.9,
)


def test_results_are_added(tmp_path: Path) -> None:
    add_result(tmp_path, "pope", POPE)
    add_result(tmp_path, "gqa", Result(protocol="llava", metrics={"accuracy": 62.0}, questions=2, limit=2))
    assert list(read_results(tmp_path)) == ["gqa", "pope"]
    before = (tmp_path / "result.json").read_bytes()
    add_result(tmp_path, "pope", POPE)
    assert (tmp_path / "result.json").read_bytes() == before
    (tmp_path / "result.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="is not JSON .* score again with --score-only"):
        add_result(tmp_path, "pope", POPE)
    (tmp_path / "result.json").write_text('{"a": 1}', encoding="utf-8")
    with pytest.raises(UserError, match="was not written by this command"):
        add_result(tmp_path, "pope", POPE)


def test_the_headline_comes_first_with_what_is_published() -> None:
    assert score_table({"pope": POPE}).splitlines() == [
        "benchmark  protocol  metric    score  published  questions",
        "pope       llava     f1        85.93       85.9       8910",
        "                     accuracy  87.10",
    ]


def test_published_scores_are_those_of_the_same_model_and_protocol() -> None:
    assert published_score("llava-v1.5-7b", "mme", "llava") == 1510.7
    assert published_score("llava-v1.5-13b-hf", "pope", "llava") == 85.9
    assert published_score("llava-v1.6-vicuna-7b", "mmmu", "llava") == 35.8
    assert published_score("llava-v1.5-7b", "pope", "lmms-eval") is None
    assert published_score("my-model", "pope", "llava") is published_score(None, "pope", "llava") is None
    assert published_score("llava-v1.5-7b", "refcoco", "llava") is None
