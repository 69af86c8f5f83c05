"""Benchmarks with a judge: asked about each answer once, its score and reviews, and a dry run that asks nobody."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from paddlemix.errors import UserError
from paddlemix.evaluation.evaluation_plan import EvaluationPlan
from paddlemix.evaluation.judged import JudgePlan
from paddlemix.evaluation.judging.endpoint import Judge
from paddlemix.evaluation.judging.judge_request import JudgeRequest
from paddlemix.evaluation.result_file import Result, read_results
from paddlemix.evaluation.score_table import score_table
from paddlemix.evaluation.scored import score_predictions
from tests.evaluation.benchmarks import tiny_benchmarks as tiny

JUDGE = Judge(address="http://127.0.0.1:9/v1", model="gpt-4-0314")


def scored(tmp_path: Path, name: str, plan: JudgePlan | None) -> tuple[dict[str, Result], list[UserError]]:
    root, output = tmp_path / "eval", tmp_path / "out"
    if not root.exists():
        tiny.BUILDERS[name](root)
    whole = EvaluationPlan(names=(name,), data_root=root, output=output, judge=plan)
    lines = [
        {
            "question_id": one.question_id,
            "prompt": one.text,
            "text": f"Answer {place}",
            "answer_id": "x",
            "model_id": "m",
        }
        for place, one in enumerate(whole.prepared(name).questions)
    ]
    tiny.write_lines(output / name / "predictions.jsonl", [{**line, "metadata": {}} for line in lines])
    return score_predictions(whole)


@pytest.mark.parametrize(("name", "prefix"), [("llava_bench", "llava_bench_"), ("qa90", "")])
def test_two_answers_are_compared(name: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[JudgeRequest] = []

    def ask(judge: Judge, request: JudgeRequest) -> str:
        asked.append(request)
        return f"8 {7 + len(asked)}\nBecause."

    monkeypatch.setattr(Judge, "ask", ask)
    results, problems = scored(tmp_path, name, JudgePlan(judge=JUDGE))
    assert problems == [] and len(asked) == 3
    assert "GPT-4 says 0." in asked[0].user and "Answer 0" in asked[0].user
    assert ("Caption 0." if prefix else "One.\nTwo.\n\ncat: [0.1, 0.2, 0.3, 0.4]") in asked[0].user
    result = results[name]
    assert result.metrics == {"relative_score": 112.5, "reference_score": 80.0, "score": 90.0}
    assert result.by_category[f"{prefix}detail"]["score"] == 90.0 and result.scored_by == "judge gpt-4-0314"
    reviews = [json.loads(line) for line in (tmp_path / "out" / name / "reviews.jsonl").read_text().splitlines()]
    assert [review["tuple"] for review in reviews] == [[8.0, 8.0], [8.0, 9.0], [8.0, 10.0]]
    assert [review["answer1_id"] for review in reviews] == ["id0", "id1", "id2"]


def test_answers_are_graded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Judge, "ask", lambda judge, request: "0.5" if "x 0?" in request.user else "1.0")
    results, problems = scored(tmp_path, "mmvet", JudgePlan(judge=JUDGE))
    assert problems == [] and results["mmvet"].metrics == {"total": 75.0}
    assert results["mmvet"].by_category["math_ocr"] == {"score": 100.0}
    written = json.loads((tmp_path / "out" / "mmvet" / "mm-vet_results.json").read_text(encoding="utf-8"))
    assert written == {"v1_0": "Answer 0", "v1_1": "Answer 1"}


def test_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PADDLEMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(logging.getLogger("paddlemix"), "propagate", True)
    for plan in (None, JudgePlan(judge=JUDGE, dry_run=True)):
        with caplog.at_level(logging.INFO, "paddlemix"):
            results, problems = scored(tmp_path, "llava_bench", plan)
        assert problems == [] and results["llava_bench"].metrics == {}
    assert "llava_bench: the judge would be sent 3 requests, " in caplog.text
    assert "needs a judge (--judge-address)" in score_table(results)
    assert read_results(tmp_path / "out")["llava_bench"]["scored_by"] is None


def test_a_judge_that_fails_is_one_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(judge: Judge, request: JudgeRequest) -> str:
        raise UserError("the judge cannot be asked")

    monkeypatch.setattr(Judge, "ask", ask)
    results, problems = scored(tmp_path, "mmvet", JudgePlan(judge=JUDGE))
    assert results == {} and [str(problem) for problem in problems] == ["the judge cannot be asked"]
    assert read_results(tmp_path / "out") == {}
