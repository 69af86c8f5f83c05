"""MathVista: answers read and brought into the form of the right ones."""

from __future__ import annotations

import pytest

from paddlemix.evaluation.scoring.mathvista import extract, normalise, score_mathvista
from tests.evaluation.scoring.asked import ask

CHOICE = {"question_type": "multi_choice", "answer_type": "text", "choices": ["cat", "red car", "dog"]}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("(B) is it", "red car"), ("B", "red car"), ("b", "cat"), ("a red cat", "red car"), ("", "cat"), ("(z)", "cat")],
)
def test_choices(text: str, wanted: str) -> None:
    assert normalise(text, CHOICE) == wanted


@pytest.mark.parametrize(
    ("kind", "text", "wanted"),
    [
        ("integer", "2.9", "2"),
        ("integer", "two", None),
        ("integer", "1e400", None),
        ("float", "3.14159", "3.1"),
        ("float", "3", "3.0"),
        ("list", "[1, 2]", "[1, 2]"),
    ],
)
def test_numbers(kind: str, text: str, wanted: str | None) -> None:
    problem = {"question_type": "free_form", "answer_type": kind, "precision": 1.0}
    assert normalise(extract(text, problem), problem) == wanted


def test_a_quoted_answer_is_read() -> None:
    assert extract('The answer is "dog".', CHOICE) == "dog"
    assert extract("red car", CHOICE) == "red car"


def test_score_and_what_a_judge_extracted() -> None:
    record = {"question_type": "free_form", "answer_type": "integer", "answer": "7", "metadata": {"task": "algebra"}}
    asked = ask(["It is 7", "7"], [record, record])
    assert score_mathvista(asked).metrics == {"accuracy": 50.0}
    score = score_mathvista(asked, extractions={0: "7"})
    assert score.metrics == {"accuracy": 100.0} and score.by_category == {"task/algebra": {"accuracy": 100.0}}
