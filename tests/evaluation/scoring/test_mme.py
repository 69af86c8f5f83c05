"""MME: yes or no at the beginning of an answer, and points for pairs."""

from __future__ import annotations

import pytest

from paddlemix.errors import UserError
from paddlemix.evaluation.scoring.answered import LMMS_EVAL, Answered
from paddlemix.evaluation.scoring.mme import (
    COGNITION,
    PERCEPTION,
    parse_first_characters,
    parse_lmms,
    release_question,
    score_mme,
)


@pytest.mark.parametrize(
    ("text", "llava", "lmms"),
    [
        ("Yes", "yes", "yes"),
        ("no, it", "no", "no"),
        (" yes", "yes", "yes"),
        ("  yes", "other", "yes"),
        ("know", "no", "no"),
        ("not sure", "no", "no"),
        ("It is yes", "other", "other"),
        ("Y", "other", "yes"),
        ("n.", "other", "no"),
        ("y.e.s", "other", "yes"),
        ("", "other", "other"),
        (".", "other", "other"),
    ],
)
def test_parsing(text: str, llava: str, lmms: str) -> None:
    assert (parse_first_characters(text), parse_lmms(text)) == (llava, lmms)


def pairs(task: str, *texts: tuple[str, str]) -> list[Answered]:
    """Images whose first question is answered by yes, the second by no."""
    return [
        Answered(question_id=f"{task}/{n}.png", text=text, category=task, record={"answer": answer})
        for n, pair in enumerate(texts)
        for text, answer in zip(pair, ("Yes", "No"), strict=True)
    ]


@pytest.mark.parametrize("protocol", ["llava", LMMS_EVAL])
def test_score(protocol: str) -> None:
    asked = pairs("OCR", ("Yes", "No"), ("Yes", "Yes")) + pairs("code_reasoning", ("No", "No"))
    score = score_mme(asked, protocol)
    assert score.by_category["OCR"] == {"score": 125.0, "accuracy": 75.0, "accuracy_plus": 50.0}
    assert score.metrics == {"perception": 125.0, "cognition": 50.0} and score.unit == "points"
    assert list(score.right) == [True, True, True, False, False, True]


def test_the_ceiling() -> None:
    asked = [one for task in (*PERCEPTION, *COGNITION) for one in pairs(task, ("Yes", "No"))]
    assert score_mme(asked).metrics == {"perception": 2000.0, "cognition": 800.0}


def test_pairs_and_tasks_are_checked() -> None:
    with pytest.raises(UserError, match="two questions for each image"):
        score_mme(pairs("OCR", ("Yes", "No"))[:1])
    both = pairs("OCR", ("Yes", "No"), ("Yes", "No"))
    with pytest.raises(UserError, match="two questions for each image"):
        score_mme([both[0], both[2], both[1], both[3]])
    with pytest.raises(UserError, match="'ocr' is not a task of MME"):
        score_mme(pairs("ocr", ("Yes", "No")))


def test_release_question() -> None:
    prompt = "Is it red?\nAnswer the question using a single word or phrase."
    assert release_question(prompt, {"Is it red? Please answer yes or no."}) == "Is it red? Please answer yes or no."
    assert release_question(prompt, {"Is it red?  Please answer yes or no."}) == "Is it red?  Please answer yes or no."
    assert release_question("Is it? Please answer yes or no.", set()) == "Is it? Please answer yes or no."
