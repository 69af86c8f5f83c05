"""Two answers compared by a judge: LLaVA-Bench-in-the-Wild and qa90.

Source: llava/eval/{eval_gpt_review_bench,eval_gpt_review_visual,summarize_gpt_review}.py of llava-torch 1.2.2.post1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paddlemix.errors import UserError
from paddlemix.evaluation.judging.judge_prompts import REVIEW_ROLE, REVIEW_RULES, REVIEWER
from paddlemix.evaluation.judging.judge_request import JudgeRequest
from paddlemix.evaluation.scoring.answered import Score, group

JUDGE = "gpt-4-0314"  # whose published figures these are
TEMPERATURE = 0.2
MAX_TOKENS = 1024
_UNREADABLE = (-1.0, -1.0)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One question and the two answers that are compared.

    Args:
        question_id, question: of the model's benchmark.
        category: conv, detail or complex; LLaVA-Bench's with "llava_bench_" before it.
        context: the description of the picture.
        answers: the reference's (GPT-4's) and the model's.
        answer_ids: of both answers, for the file of reviews.
    """

    question_id: str | int
    question: str
    category: str
    context: str
    answers: tuple[str, str]
    answer_ids: tuple[str | int, str | int] = ("", "")


def bench_context(context: Mapping[str, Any]) -> str:
    """LLaVA-Bench-in-the-Wild's description of a picture: its caption, lines where there are several."""
    caption = context["caption"]
    return caption if isinstance(caption, str) else "\n".join(caption)


def boxes_context(context: Mapping[str, Any]) -> str:
    """qa90's description of a picture: captions and boxes, one a line."""
    boxes = (f"{instance['category']}: {instance['bbox']}" for instance in context["instances"])
    return "\n".join(context["captions"]) + "\n\n" + "\n".join(boxes)


def review_request(comparison: Comparison, rules: Mapping[str, Mapping[str, str]] | None = None) -> JudgeRequest:
    """What the judge is asked about a comparison.

    Args:
        rules: category -> "role" and "prompt", as a rule.json has them; None for LLaVA's.

    Raises:
        UserError: there is no rule for the category.
    """
    known = rules or {name: {"role": REVIEW_ROLE, "prompt": prompt} for name, prompt in REVIEW_RULES.items()}
    if comparison.category not in known:
        raise UserError(
            f"question {comparison.question_id!r}: there is no rule for category '{comparison.category}'; "
            f"there are rules for {', '.join(known)}"
        )
    role, prompt = known[comparison.category]["role"], known[comparison.category]["prompt"]
    answers = "".join(
        f"[{role} {number}]\n{answer}\n\n[End of {role} {number}]\n\n"
        for number, answer in enumerate(comparison.answers, 1)
    )
    asked = f"[Context]\n{comparison.context}\n\n[Question]\n{comparison.question}\n\n{answers}[System]\n{prompt}\n\n"
    return JudgeRequest(user=asked, system=REVIEWER, temperature=TEMPERATURE, max_tokens=MAX_TOKENS)


def parse_pair(review: str) -> tuple[float, float]:
    """The two scores in the first line of a review, (-1, -1) where there are not exactly two.

    A comma counts as a space and two spaces separate three words: "8,9" and "8 9" are read, "8, 9" is not.
    """
    words = review.split("\n")[0].replace(",", " ").split(" ")
    if len(words) != 2:
        return _UNREADABLE
    try:
        first, second = (float(word) for word in words)
    except ValueError:
        return _UNREADABLE
    # "nan" is a number for the original, and would be the mean of all
    return (first, second) if math.isfinite(first) and math.isfinite(second) else _UNREADABLE


def review_line(number: int, comparison: Comparison, review: str) -> dict[str, Any]:
    """A line of LLaVA's file of reviews.

    Args:
        number: of the comparison, from 1.
    """
    return {
        "id": number,
        "question_id": comparison.question_id,
        "answer1_id": comparison.answer_ids[0],
        "answer2_id": comparison.answer_ids[1],
        "category": comparison.category,
        "content": review,
        "tuple": list(parse_pair(review)),
    }


def score_reviews(lines: Sequence[Mapping[str, Any]]) -> Score:
    """The score of a model out of the reviews of all its answers.

    Args:
        lines: see `review_line`.  A review that could not be read counts as -1 for both, in the mean too.

    Returns:
        Percent, rounded as the official table is, of all and by category: `relative_score`, the model's points in
        percent of the reference's (the published figure); `reference_score` and `score`, ten times their mean points.

    Raises:
        UserError: there is no review.
    """
    if not lines:
        raise UserError("there is no review to score")
    pairs = [tuple(line["tuple"]) for line in lines]
    by_category = {
        name: _summary([pairs[place] for place in places])
        for name, places in group(line.get("category", "") for line in lines).items()
        if name
    }
    right = [min(max(pair[1], 0.0), 10.0) / 10 for pair in pairs]
    return Score(metrics=_summary(pairs), by_category=by_category, right=right, unit="percent")


def _summary(pairs: Sequence[Sequence[float]]) -> dict[str, float]:
    # the means are rounded before they are divided
    reference, model = (round(sum(pair[side] for pair in pairs) / len(pairs), 3) for side in (0, 1))
    return {
        "relative_score": round(model / reference * 100, 1) if reference else 0.0,
        "reference_score": round(reference * 10, 1),
        "score": round(model * 10, 1),
    }
