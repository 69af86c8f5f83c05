"""SEED-Bench: one of four letters, by the type of the question, images and videos.

Source: scripts/convert_seed_for_submission.py of haotian-liu/LLaVA (commit c121f04); lmms_eval/tasks/seedbench/utils.py
of lmms-eval 0.7.3.
"""

from __future__ import annotations

from collections.abc import Sequence

from paddlemix.evaluation.scoring.answered import LLAVA, Answered, Score, as_text, check_answered, mean, means_by

DATA_TYPES = ("image", "video")


def seed_key(question_id: str | int) -> str | int:
    """The identity by which the official scorer looks up an answer: an int where the text is one ("v1_3" stays)."""
    try:
        return int(question_id)
    except ValueError:
        return question_id


def score_seed(answered: Sequence[Answered], protocol: str = LLAVA) -> Score:
    """SEED-Bench.

    Args:
        answered: with the name of their type as category; records with "answer", a letter, and "data_type", "image" or
            "video".  A question without an answer is wrong.

    Returns:
        `accuracy`, `image_accuracy`, `video_accuracy` (the last two where there is such a question) and `accuracy` of
        each type; percent, under "lmms-eval" shares.

    Raises:
        UserError: no question, or a record lacks a key.
    """
    check_answered(answered, protocol)
    is_right = _is_letter if protocol == LLAVA else _begins_with_letter
    right = [float(one.text is not None and is_right(one.text, one.value("answer"))) for one in answered]
    factor = 100.0 if protocol == LLAVA else 1.0
    kinds = [one.value("data_type") for one in answered]
    metrics = {"accuracy": mean(right) * factor}
    for kind in DATA_TYPES:
        of_kind = [value for value, found in zip(right, kinds, strict=True) if found == kind]
        # the official scorer stops at a division by zero where there is no video
        if of_kind:
            metrics[f"{kind}_accuracy"] = mean(of_kind) * factor
    return Score(
        metrics=metrics,
        by_category=means_by((one.category for one in answered), right, "accuracy", factor),
        right=right,
        unit="percent" if protocol == LLAVA else "share",
    )


def _is_letter(text: str, answer: str) -> bool:
    """The whole text is the letter: "A." and "a" are wrong."""
    return text == answer


def _begins_with_letter(text: str, answer: str) -> bool:
    """The first character is it, in either case: "Absolutely" chooses A."""
    return as_text(text).strip()[:1].lower().strip() == answer.lower().strip()
