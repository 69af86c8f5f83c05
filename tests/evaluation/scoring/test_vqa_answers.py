"""VQA answers: every quirk of the processor by itself, soft scores by hand."""

from __future__ import annotations

import pytest

from paddlemix.errors import UserError
from paddlemix.evaluation.scoring.answered import LMMS_EVAL
from paddlemix.evaluation.scoring.vqa_answers import (
    compare_form,
    lmms_soft_score,
    process_answer,
    score_vqa,
    soft_score,
    textvqa_question,
    vqa_accuracy,
)
from paddlemix.evaluation.scoring.vqa_words import ARTICLES, CONTRACTIONS, NUMBERS, PUNCTUATION
from tests.evaluation.scoring.asked import ask


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The White-House", "white house"),  # no space touches the mark: it becomes one
        ("a - b", "b"),  # a space touches it: it goes
        ("x-y - z", "xy z"),  # ... everywhere
        ("50%", "50%"),
        ("no,yes", "noyes"),
        ("1,000", "1000"),
        ("3.5 and 3.", "3.5 and 3"),
        ("e.g.", "eg"),
        ("Tom's", "tom 's"),
        ("none of Ten", "0 of 10"),
        ("dont", "don't"),
        ("Im", "im"),  # the table has "Im", the text is lower case
        ("somebody'd", "somebodyd"),
        ("An apple\nis\tred?", "apple is red"),
        (". " * 40, ". . . . . . . ."),  # of forty periods 32 go
    ],
)
def test_process_answer(text: str, wanted: str) -> None:
    assert process_answer(text) == wanted


def test_commas_are_there_where_the_first_half_is_left_out() -> None:
    assert compare_form("1,000 (a)") == "1000"  # a comma between digits removes all marks; "a" is an article
    assert compare_form("Red-Car") == "red car"


def test_tables() -> None:
    assert (
        len(CONTRACTIONS) == 120 and CONTRACTIONS["yall'd've"] == "y'all'd've" and CONTRACTIONS["ow's'at"] == "'ow's'at"
    )
    assert len(NUMBERS) == 12 and len(PUNCTUATION) == 21 and ARTICLES == ("a", "an", "the")


@pytest.mark.parametrize(("agreeing", "wanted"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_soft_score(agreeing: int, wanted: float) -> None:
    references = ["The Red"] * agreeing + ["blue"] * (10 - agreeing)
    assert soft_score("red.", references) == pytest.approx(wanted)
    assert lmms_soft_score("red.", references) == wanted


def test_ten_references_are_needed() -> None:
    with pytest.raises(UserError, match="10 reference answers, not 3"):
        soft_score("red", ["red"] * 3)
    assert vqa_accuracy("Red.", ["red"]) == 1.0  # custom data: any of fewer than four
    assert vqa_accuracy("Red.", ["red", "blue"] * 2) == pytest.approx((1 / 3 + 2 / 3 + 1 / 3 + 2 / 3) / 4)
    assert vqa_accuracy("red", []) == 0.0


@pytest.mark.parametrize(
    "prompt",
    [
        "What is IT?\nAnswer.",
        "What is IT?\nReference OCR token: a, b\nAnswer.",
        "Reference OCR token: \nWhat is IT?\nAnswer.",
        "OCR tokens: a. Question: What is IT? Short answer:",
    ],
)
def test_textvqa_question(prompt: str) -> None:
    assert textvqa_question(prompt) == "what is it?"


def test_another_prompt_is_refused() -> None:
    with pytest.raises(UserError, match="is not a question and an instruction"):
        textvqa_question("What is it?\na\nb")


def test_score_vqa() -> None:
    records = [
        {"answers": ["red"] * 10, "category": "a"},
        {"answers": ["go"] * 8 + ["stop"] * 2},
        {"answers": ["x"] * 10},
    ]
    score = score_vqa(ask(["Red", "Stop.", None], records))
    assert score.metrics == {"accuracy": pytest.approx(160 / 3)} and score.unit == "percent"
    assert score.by_category == {"a": {"accuracy": 100.0}} and score.right == pytest.approx([1, 0.6, 0])
    assert score_vqa(ask(["Red"], records[:1]), LMMS_EVAL).metrics == {"accuracy": 1.0}
    asked = ask(["red, car"], [{"answers": ["red car"] * 10}])  # the comma touches a space: it goes in both
    assert score_vqa(asked, LMMS_EVAL, is_vqav2=True).right == [1.0] == score_vqa(asked).right
    asked = ask(["red,car"], [{"answers": ["red car"] * 10}])  # here it becomes one, or is removed beforehand
    assert score_vqa(asked, LMMS_EVAL, is_vqav2=True).right == [1.0] and score_vqa(asked).right == [0.0]
