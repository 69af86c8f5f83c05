"""MMMU: letters, open answers, subjects and domains."""

from __future__ import annotations

import random

import pytest

from paddlemix.errors import UserError
from paddlemix.evaluation.scoring.mmmu import is_right_open, normalise, parse_choice, parse_open, score_mmmu, subject_of
from tests.evaluation.scoring.asked import ask

OPTIONS = {"A": "cat", "B": "red car", "C": "dog"}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("B", "B"),
        ("(A) or (B)", "B"),  # the last in brackets
        ("A , B and C", "C"),
        ("B. cat A.", "A"),  # its final period goes, and a letter before a space comes before one with a period
        ("I see DNA here", "A"),  # a letter before a space may end a word
        ("it shows one red car and nothing else", "B"),
    ],
)
def test_parse_choice(text: str, wanted: str) -> None:
    assert parse_choice(text, OPTIONS, random.Random(0)) == wanted


def test_without_a_letter_one_is_drawn_the_same_every_time() -> None:
    drawn = random.Random(42).choice(list(OPTIONS))
    assert parse_choice("none", OPTIONS, random.Random(42)) == drawn
    records = [
        {"id": "validation_Art_1", "question_type": "multiple-choice", "options": ["x", "y"], "answer": "A"}
    ] * 20
    scores = [score_mmmu(ask(["?"] * 20, records)) for _ in range(2)]
    assert scores[0] == scores[1] and 0 < scores[0].metrics["accuracy"] < 1


def test_open_answers() -> None:
    assert parse_open("The answer is 1,000.") == {1000.0, 0.0}  # "000" is a number too
    assert parse_open("So x = 3.456") == {3.46}
    assert is_right_open("The width is 12 cm", "12") and not is_right_open("The width is 112 cm", "12")
    assert is_right_open("it is a red car", ["blue", "Red"]) and not is_right_open("about 3", "4")
    assert normalise("A") == [" a", "a "] and normalise("1,234.567") == [1234.57]


def test_subjects_and_domains() -> None:
    records = [
        {"id": "validation_Art_Theory_1", "question_type": "open", "options": [], "answer": "12"},
        {"id": "validation_Music_2", "question_type": "multiple-choice", "options": ["x", "y"], "answer": "B"},
    ]
    score = score_mmmu(ask(["It is 12.", "A"], records))
    assert score.metrics == {"accuracy": 0.5}
    assert score.by_category["Art and Design"] == {"accuracy": 0.5}
    assert score.by_category["Art_Theory"] == {"accuracy": 1.0}
    assert subject_of("test_Clinical_Medicine_100") == "Clinical_Medicine"
    with pytest.raises(UserError, match="SPLIT_SUBJECT_NUMBER"):
        subject_of("Art")
