"""Judged benchmarks: what is asked, what replies mean, scores; `tests/reference` compares with the real scripts."""

from __future__ import annotations

import pytest

from paddlemix.errors import UserError
from paddlemix.evaluation.judging.judge_prompts import MM_VET, MM_VET_AGAIN, REVIEW_RULES
from paddlemix.evaluation.judging.judge_request import JudgeRequest
from paddlemix.evaluation.judging.mm_vet import grade, grade_request, parse_grade, score_mm_vet
from paddlemix.evaluation.judging.reviews import (
    Comparison,
    bench_context,
    boxes_context,
    parse_pair,
    review_line,
    review_request,
    score_reviews,
)
from paddlemix.evaluation.scoring.answered import LMMS_EVAL, Answered


def comparison(category: str = "llava_bench_conv") -> Comparison:
    return Comparison(
        question_id=4,
        question="Who?",
        category=category,
        context="A man.",
        answers=("One.", "Two."),
        answer_ids=("r", "m"),
    )


def test_a_review_is_asked_for() -> None:
    request = review_request(comparison())
    wanted = (
        "[Context]\nA man.\n\n[Question]\nWho?\n\n[Assistant 1]\nOne.\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\nTwo.\n\n[End of Assistant 2]\n\n[System]\n{REVIEW_RULES['llava_bench_conv']}\n\n"
    )
    assert request.user == wanted and (request.temperature, request.max_tokens) == (0.2, 1024)
    assert [one["role"] for one in request.messages()] == ["system", "user"]
    own = review_request(comparison("mine"), {"mine": {"role": "Model", "prompt": "Which?"}})
    assert "[Model 1]\nOne." in own.user and own.user.endswith("[System]\nWhich?\n\n")
    with pytest.raises(UserError, match="no rule for category 'conversation'"):
        review_request(comparison("conversation"))


def test_descriptions_of_pictures() -> None:
    assert bench_context({"caption": "One."}) == "One." and bench_context({"caption": ["One.", "Two."]}) == "One.\nTwo."
    context = {"captions": ["A.", "B."], "instances": [{"category": "cat", "bbox": [0.1, 0.2, 0.3, 0.4]}]}
    assert boxes_context(context) == "A.\nB.\n\ncat: [0.1, 0.2, 0.3, 0.4]"


@pytest.mark.parametrize(
    ("review", "wanted"),
    [
        ("8 9\nGood.", (8, 9)),
        ("8,9", (8, 9)),
        ("8, 9", (-1, -1)),  # two spaces are three words
        ("8", (-1, -1)),
        ("eight nine", (-1, -1)),
        ("nan 9", (-1, -1)),
        ("", (-1, -1)),
    ],
)
def test_parse_pair(review: str, wanted: tuple[float, float]) -> None:
    assert parse_pair(review) == wanted


def test_score_of_reviews() -> None:
    lines = [review_line(1, comparison(), "8 6"), review_line(2, comparison("llava_bench_detail"), "none")]
    assert lines[0]["tuple"] == [8, 6] and lines[0]["answer2_id"] == "m"
    score = score_reviews(lines)
    # what cannot be read counts as -1 of both
    assert score.metrics == {"relative_score": 71.4, "reference_score": 35.0, "score": 25.0}
    assert score.by_category["llava_bench_conv"] == {"relative_score": 75.0, "reference_score": 80.0, "score": 60.0}
    assert list(score.right) == [0.6, 0.0]
    with pytest.raises(UserError, match="no review"):
        score_reviews([])


ONE = Answered(question_id="v1_0", text="x = -1", record={"question": "What is x?", "answer": "-1<AND>-5"})


def test_a_grade_is_asked_for_again() -> None:
    row = f"{MM_VET}\nWhat is x? | -1 <AND> -5 | x = -1 | "
    replies = iter(["none", "2.0", "0.5 because"])
    asked: list[JudgeRequest] = []

    def ask(request: JudgeRequest) -> str:
        asked.append(request)
        return next(replies)

    assert grade(ONE, ask) == 0.5
    assert [one.user for one in asked] == [row, row + MM_VET_AGAIN, row + MM_VET_AGAIN]
    assert [one.temperature for one in asked] == [0.0, 0.0, 0.5] and asked[0].max_tokens == 3
    assert grade(ONE, lambda request: "none") == 0.0
    assert grade_request(ONE, LMMS_EVAL, failures=2).temperature == 1.0


def test_parse_grade() -> None:
    assert [parse_grade(reply) for reply in ("0.5", "1 or so", "1.1", "-0.1", "nan", "", "x")] == [0.5, 1.0] + [
        None
    ] * 5


def test_score_of_mm_vet() -> None:
    records = [{"capability": ["ocr", "math"]}, {"capability": "math,ocr"}, {"capability": ["rec"]}]
    asked = [Answered(question_id=n, text="", record=record) for n, record in enumerate(records)]
    score = score_mm_vet(asked, [1.0, 0.5, 0.0])
    assert score.metrics == {"total": 50.0}
    assert score.by_category == {
        "math": {"score": 75.0},
        "ocr": {"score": 75.0},
        "rec": {"score": 0.0},
        "math_ocr": {"score": 75.0},
    }
