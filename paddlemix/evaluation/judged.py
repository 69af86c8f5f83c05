"""Answers that a judge compares or grades: LLaVA-Bench, qa90 and MM-Vet, their score, and LLaVA's file of reviews.

Replies are kept in the cache, so that whatever was asked once costs nothing again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paddlemix.cache import replacing
from paddlemix.evaluation.judging.endpoint import Judge
from paddlemix.evaluation.judging.judge_request import JudgeRequest
from paddlemix.evaluation.judging.mm_vet import grade, grade_request, score_mm_vet
from paddlemix.evaluation.judging.reviews import Comparison, review_line, review_request, score_reviews
from paddlemix.evaluation.prepared import Prepared
from paddlemix.evaluation.scoring.answered import Answered, Score, as_text
from paddlemix.progress_bar import ProgressBar

_REVIEWS = "reviews.jsonl"


@dataclass(frozen=True, kw_only=True)
class JudgePlan:
    """Who judges.

    Args:
        judge: whom.
        dry_run: ask nobody, and say what would be asked.
    """

    judge: Judge
    dry_run: bool = False


def first_requests(prepared: Prepared, answered: Sequence[Answered]) -> list[JudgeRequest]:
    """What the judge is asked about each answer, as long as every reply can be read."""
    if prepared.benchmark.judged == "grades":
        return [grade_request(one, prepared.protocol) for one in answered]
    return [review_request(_comparison(one)) for one in answered]


def judge_answers(prepared: Prepared, answered: Sequence[Answered], judge: Judge) -> Score:
    """The score that a judge gives; the reviews of two answers are written beside the predictions.

    Raises:
        UserError: the judge cannot be asked; what it has said is kept.
    """
    with ProgressBar(f"judge {prepared.benchmark.name}", len(answered)) as bar:
        if prepared.benchmark.judged == "grades":
            grades = []
            for one in answered:
                grades.append(grade(one, judge.ask, prepared.protocol))
                bar.update()
            return score_mm_vet(answered, grades)
        lines = []
        for number, one in enumerate(answered, 1):
            comparison = _comparison(one)
            lines.append(review_line(number, comparison, judge.ask(review_request(comparison))))
            bar.update()
    _write_reviews(prepared.folder / _REVIEWS, lines)
    return score_reviews(lines)


def _comparison(one: Answered) -> Comparison:
    return Comparison(
        question_id=one.question_id,
        question=str(one.value("text")),
        category=one.category,
        context=one.value("context"),
        answers=(one.value("reference"), as_text(one.text)),
        answer_ids=(one.value("reference_id"), ""),
    )


def _write_reviews(path: Path, lines: Sequence[dict[str, object]]) -> None:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
