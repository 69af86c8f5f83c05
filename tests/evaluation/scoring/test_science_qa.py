"""ScienceQA: which answers name a letter, and what counts for the accuracy with images."""

from __future__ import annotations

import pytest

from paddlemix.evaluation.scoring.answered import LMMS_EVAL
from paddlemix.evaluation.scoring.science_qa import choice_index, parse_letter, score_science_qa
from tests.evaluation.scoring.asked import ask


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("B", "B"),
        ("B. It rains", "B"),
        ("B. ", "B"),
        ("B.", "FAILED"),
        ("b", "FAILED"),
        ("", "FAILED"),
        ("AB", "FAILED"),
        ("F. It rains", "FAILED"),
        ("So. The answer is C.", "C"),
        ("The answer is C!", "C"),  # the final period is any character
        ("The answer is C", "FAILED"),
        ("The answer is Z.", "Z"),
        ("The answer is B. The answer is B.", "FAILED"),
    ],
)
def test_parse_letter(text: str, wanted: str) -> None:
    assert parse_letter(text) == wanted


def test_choice_index() -> None:
    assert [choice_index(letter, "abc") for letter in ("A", "C", "D", "FAILED", "")] == [0, 2, -1, -1, -1]
    assert choice_index("E", "abcdefg") == 4 and choice_index("F", "abcdefg") == -1  # five letters are known


def test_score() -> None:
    records = [
        {"choices": ["a", "b"], "answer": 1, "prompt": "<image>\nQ", "category": "x"},
        {"choices": ["a", "b"], "answer": 1, "prompt": "<image>\nQ", "category": "x"},
        {"choices": ["a", "b"], "answer": 0, "prompt": "Q"},
        {"choices": ["a", "b"], "answer": 0, "prompt": "<image>\nQ"},
    ]
    score = score_science_qa(ask(["B. b", "B.", "A", None], records))
    # the last has no answer: wrong, but not among those with an image
    assert score.metrics == {"accuracy": 50.0, "img_accuracy": 50.0} and score.unit == "percent"
    assert score.by_category == {"x": {"accuracy": 50.0}} and list(score.right) == [1, 0, 1, 0]
    assert "img_accuracy" not in score_science_qa(ask(["A"], records[2:3])).metrics


def test_lmms_eval_reads_other_forms() -> None:
    records = [{"choices": ["a", "b"], "answer": 1, "image": "a.png"}] * 4
    score = score_science_qa(ask(["b", "B.", " B.It", "The answer is B."], records), LMMS_EVAL)
    assert list(score.right) == [1, 1, 1, 0] and score.metrics == {"accuracy": 0.75, "img_accuracy": 0.75}
