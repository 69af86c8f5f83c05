"""GQA: the answer is exactly the one right word or phrase.

Source: eval.py of GQA (with the parts that LLaVA leaves out for lack of its files: validity, plausibility,
consistency, grounding) on what scripts/convert_gqa_for_eval.py of haotian-liu/LLaVA (commit c121f04) writes;
lmms_eval/tasks/gqa/gqa.yaml and api/metrics.py of lmms-eval 0.7.3.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from paddlemix.evaluation.scoring.answered import LLAVA, Answered, Score, as_text, check_answered, mean, means_by

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def gqa_prediction(text: str) -> str:
    """An answer as GQA's file of predictions has it: lower case, without final periods (all of them)."""
    return text.rstrip(".").lower()


def score_gqa(answered: Sequence[Answered], protocol: str = LLAVA) -> Score:
    """GQA.

    Args:
        answered: records with "answer", and, as testdev_balanced_questions.json has them, "types" with "structural"
            and "semantic", "groups" with "global".

    Returns:
        `accuracy`, and where the records have types `binary` and `open` (percent), where they have groups
        `distribution` (the distance between the answers' and the references' distributions, 0 is best); of each type
        `accuracy`, as "structural/NAME" and "semantic/NAME".  Under "lmms-eval" `accuracy` alone, a share.

    Raises:
        UserError: no question, or no answer in a record.
    """
    check_answered(answered, protocol)
    if protocol != LLAVA:
        return _lmms_score(answered)
    said = [gqa_prediction(as_text(one.text)) for one in answered]
    right = [float(text == one.value("answer")) for text, one in zip(said, answered, strict=True)]
    structural, semantic = (_kinds(answered, "types", kind) for kind in ("structural", "semantic"))
    # every structure but "query" is answered by yes, no or one of two words in the question
    kinds = [kind and ("open" if kind == "query" else "binary") for kind in structural]
    metrics = {"accuracy": mean(right) * 100}
    metrics |= {kind: values["accuracy"] for kind, values in means_by(kinds, right, "accuracy", 100).items() if kind}
    groups = _kinds(answered, "groups", "global")
    if any(name is not None for name in groups):
        gold = [one.value("answer") for one in answered]
        metrics["distribution"] = _chi_square(groups, gold, said) / 100
    by_category = {
        f"{name}/{kind}": values
        for name, found in (("structural", structural), ("semantic", semantic))
        for kind, values in means_by(found, right, "accuracy", 100).items()
    }
    return Score(metrics=metrics, by_category=by_category, right=right, unit="percent")


def _kinds(answered: Sequence[Answered], key: str, kind: str) -> list[Any]:
    """A value of a part of each record, None where it has none."""
    return [(one.record.get(key) or {}).get(kind) for one in answered]


def _chi_square(groups: Sequence[Any], gold: Sequence[str], said: Sequence[str]) -> float:
    """The mean over questions of their group's chi-square distance; groups of None are left out.

    Answers that are right for no question of the group do not count.
    """
    wanted: dict[Any, Counter[str]] = {}
    found: dict[Any, Counter[str]] = {}
    for name, right, text in zip(groups, gold, said, strict=True):
        if name is not None:
            wanted.setdefault(name, Counter())[right] += 1
            found.setdefault(name, Counter())[text] += 1
    distance, questions = 0.0, 0
    for name, counts in wanted.items():
        size = sum(counts.values())
        distance += size * sum((found[name][answer] - count) ** 2 / count for answer, count in counts.items())
        questions += size
    return distance / questions


def _lmms_score(answered: Sequence[Answered]) -> Score:
    """Exact match without case and ASCII punctuation; spaces count."""
    right = [
        float(
            as_text(one.text).lower().translate(_NO_PUNCTUATION)
            == one.value("answer").lower().translate(_NO_PUNCTUATION)
        )
        for one in answered
    ]
    return Score(metrics={"accuracy": mean(right)}, right=right)
