"""ScienceQA: a letter in an answer, against the index of the right choice.

Source: llava/eval/eval_science_qa.py of llava-torch 1.2.2.post1; lmms_eval/tasks/scienceqa/utils.py of lmms-eval 0.7.3.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from paddlemix.evaluation.scoring.answered import LLAVA, Answered, Score, as_text, check_answered, mean, means_by

OPTIONS = "ABCDE"
FAILED = "FAILED"
# The final period is any character, and must be there: "The answer is B" alone does not match.
_SENTENCE = re.compile(r"The answer is ([A-Z]).")


def parse_letter(text: str) -> str:
    """The letter that an answer chooses, "FAILED" where none is found.

    "B", "B. It rains" and one sentence "The answer is B." are read; "B.", "b" and two such sentences are not.
    """
    # the first letter is looked up in a list, so that "" or "AB" is not in it
    if text in list(OPTIONS):
        return text
    if text[:1] in list(OPTIONS) and text[1:3] == ". ":
        return text[0]
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else FAILED


def choice_index(letter: str, choices: Sequence[str]) -> int:
    """The index of a letter among the first five choices, -1 for one that is not among them."""
    return OPTIONS.index(letter) if letter in list(OPTIONS[: len(choices)]) else -1


def score_science_qa(answered: Sequence[Answered], protocol: str = LLAVA) -> Score:
    """ScienceQA.

    Args:
        answered: records with "choices" and "answer", an index.  A question without an answer is wrong, and under
            "llava" does not count for the accuracy with images, whatever it has.

    Returns:
        `accuracy` of all and `img_accuracy` of those with an image, which is the published figure; percent, under
        "lmms-eval" shares.  `img_accuracy` is left out where no question has an image.

    Raises:
        UserError: no question, or a record lacks a key.
    """
    check_answered(answered, protocol)
    if protocol == LLAVA:
        right: list[float] = [float(_is_right(one)) for one in answered]
        # by the mark in the prompt that was asked, not by the record
        shown = [one.text is not None and "<image>" in one.prompt for one in answered]
        factor, unit = 100.0, "percent"
    else:
        right = [float(_lmms_is_right(one)) for one in answered]
        shown = [one.image is not None for one in answered]
        factor, unit = 1.0, "share"
    metrics = {"accuracy": mean(right) * factor}
    if any(shown):
        metrics["img_accuracy"] = mean(value for value, is_shown in zip(right, shown, strict=True) if is_shown) * factor
    by_category = means_by((one.category for one in answered), right, "accuracy", factor)
    return Score(metrics=metrics, by_category=by_category, right=right, unit=unit)


def _is_right(one: Answered) -> bool:
    text = FAILED if one.text is None else one.text
    return choice_index(parse_letter(text), one.value("choices")) == one.value("answer")


def _lmms_is_right(one: Answered) -> bool:
    wanted = chr(ord("A") + one.value("answer")).lower()
    text = as_text(one.text).strip()
    if text.lower() == wanted:
        return True
    # "B." and "B.It" are read here, unlike in LLaVA's scorer; so is any capital letter of any script
    return len(text) >= 2 and text[0].isupper() and text[1] == "." and text[0].lower() == wanted
