"""MMBench: which option an answer chooses, and CircularEval."""

from __future__ import annotations

import pytest

from paddlemix.evaluation.scoring.answered import LMMS_EVAL, Answered
from paddlemix.evaluation.scoring.mmbench import (
    ROTATION,
    extract_letter,
    infer,
    infer_option,
    options_of,
    score_mmbench,
)

OPTIONS = {"A": "cat", "B": "a red car", "C": "dog"}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("B", "B"),
        ("It is B", "B"),
        ("B.", "B"),
        ("(C)", "C"),
        ("answer :B).", "B"),
        ("A cat", "A"),
        ("It is A cat indeed", None),  # A may be an article in a longer answer
        ("A or B", None),
        ("b", None),
        ("Failed to obtain answer via API B", None),
    ],
)
def test_infer_option(text: str, wanted: str | None) -> None:
    assert infer_option(text) == wanted


def test_infer_by_text() -> None:
    assert infer("It is A RED CAR, I think", OPTIONS) == "B"
    assert infer("the cat and the dog", OPTIONS) is None
    assert infer("a banana", {"A": "cat", "D": "nan"}) == "D"  # "nan" as a text is an option
    assert options_of({"A": "cat", "B": float("nan"), "C": None, "E": "x"}) == {"A": "cat"}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", ""),
        ("A cat and (B)", "A"),  # the start is believed most
        ("it says B: or (C) or D", "D"),
        ("I choose BD", "D"),  # after a phrase, the later one
        ("xDx", "D"),
        ("none", ""),
    ],
)
def test_extract_letter(text: str, wanted: str) -> None:
    assert extract_letter(text, "ABCD") == wanted


def rows(texts: dict[int, tuple[str, str]]) -> list[Answered]:
    record = {**OPTIONS, "l2-category": "logic"}
    return [
        Answered(question_id=index, text=text, category="ocr", record={**record, "answer": answer})
        for index, (text, answer) in texts.items()
    ]


def test_every_rotation_must_be_right() -> None:
    asked = rows({1: ("A", "A"), 1 + ROTATION: ("B", "B"), 2: ("A", "A"), 2 + ROTATION: ("A", "C"), 3: ("a bird", "A")})
    score = score_mmbench(asked)
    assert score.metrics == {"accuracy": pytest.approx(100 / 3), "row_accuracy": 60.0}
    assert list(score.by_category) == ["ocr", "l2-category/logic"]
    assert list(score.right) == [1, 1, 1, 0, 0]


def test_lmms_eval_reads_on() -> None:
    asked = rows({1: ("The answer is A or so I think", "A")})
    assert score_mmbench(asked).metrics["accuracy"] == 0.0
    assert score_mmbench(asked, LMMS_EVAL).metrics["accuracy"] == 100.0
