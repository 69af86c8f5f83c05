"""POPE: whether the model says yes or no, against labels of three categories of 50 % "yes" each.

Source: llava/eval/eval_pope.py of llava-torch 1.2.2.post1; lmms_eval/tasks/pope/utils.py of lmms-eval 0.7.3.
"""

from __future__ import annotations

from collections.abc import Sequence

from paddlemix.errors import UserError
from paddlemix.evaluation.scoring.answered import (
    LLAVA,
    Answered,
    Score,
    as_text,
    check_answered,
    group,
    mean,
)

YES, NO = "yes", "no"
METRICS = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def parse_yes_no(text: str) -> str:
    """ "no" where the first sentence has the word No, no or not, else "yes".

    Whatever is not a no is a yes, "Nothing", "NO" and an empty answer too.  Only a space separates words: the "no" of
    "Is it?\\nno" is not seen.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return NO if {"No", "not", "no"} & set(words) else YES


def score_pope(answered: Sequence[Answered], protocol: str = LLAVA) -> Score:
    """POPE.

    Args:
        answered: with their category; records with "label".  The official scorer pairs answers and labels by their
            position in the category: whoever makes the records does so too.

    Returns:
        `accuracy precision recall f1 yes_ratio`, shares, of each category.  Under "llava" the metrics are the means of
        the categories', as the published 85.9 is; under "lmms-eval" they are of all questions.

    Raises:
        UserError: no question, or no label.
    """
    check_answered(answered, protocol)
    if protocol == LLAVA:
        said = [parse_yes_no(as_text(one.text)) for one in answered]
        # any label that is not "no" counts as yes
        labels = [NO if one.value("label") == NO else YES for one in answered]
        measure = _llava_metrics
    else:
        # no parsing: "No." is wrong
        said = [as_text(one.text).lower().strip() for one in answered]
        labels = [_label(one) for one in answered]
        measure = _lmms_metrics
    places = group(one.category for one in answered)
    by_category = {
        name: measure([said[place] for place in of_it], [labels[place] for place in of_it])
        for name, of_it in places.items()
    }
    means = {name: mean(values[name] for values in by_category.values()) for name in METRICS}
    return Score(
        metrics=means if protocol == LLAVA else measure(said, labels),
        by_category=by_category,
        right=[text == label for text, label in zip(said, labels, strict=True)],
    )


def _label(one: Answered) -> str:
    label = str(one.value("label")).lower().strip()
    if label not in (YES, NO):
        raise UserError(f"question {one.question_id!r}: the label {label!r} is not yes or no")
    return label


def _llava_metrics(said: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    pairs = list(zip(said, labels, strict=True))
    true_yes, false_yes, false_no = (pairs.count(pair) for pair in ((YES, YES), (YES, NO), (NO, YES)))
    precision, recall = _share(true_yes, true_yes + false_yes), _share(true_yes, true_yes + false_no)
    return {
        "accuracy": (true_yes + pairs.count((NO, NO))) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": _f1(precision, recall),
        "yes_ratio": said.count(YES) / len(said),
    }


def _lmms_metrics(said: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    metrics = _llava_metrics(said, labels)
    pairs = list(zip(said, labels, strict=True))
    # An answer that is neither yes nor no is wrong, but not counted as a missed yes: recall leaves it out.
    metrics["accuracy"] = sum(text == label for text, label in pairs) / len(pairs)
    # The ratio is of the labels, not of the answers: it says nothing about the model.
    metrics["yes_ratio"] = list(labels).count(YES) / len(labels)
    return metrics


def _share(part: int, whole: int) -> float:
    """LLaVA's scorer stops at a division by zero where nobody says yes; lmms-eval counts 0, and so does this."""
    return part / whole if whole else 0.0


def _f1(precision: float, recall: float) -> float:
    both = precision + recall
    # lmms-eval multiplies in another order, 2 * (p * r); doubling is exact, so that the result is the same
    return 2 * precision * recall / both if both else 0.0
