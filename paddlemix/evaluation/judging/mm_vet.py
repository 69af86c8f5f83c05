"""MM-Vet: a judge grades each answer between 0 and 1 against the right one; the mean by capability.

Source: mm-vet_evaluator.py of yuweihao/MM-Vet; lmms_eval/tasks/mmvet/utils.py of lmms-eval 0.7.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paddlemix.evaluation.judging.judge_prompts import MM_VET, MM_VET_AGAIN, MM_VET_LMMS
from paddlemix.evaluation.judging.judge_request import JudgeRequest
from paddlemix.evaluation.scoring.answered import LLAVA, LMMS_EVAL, Answered, Score, as_text, check_answered, mean

JUDGE = "gpt-4-0613"
_MAX_TOKENS = {LLAVA: 3, LMMS_EVAL: 128}
_MAX_TRIES = {LLAVA: 5, LMMS_EVAL: 4}  # replies that are read before the grade is 0
_WARMER = 0.5  # what the temperature rises by after a reply that is not a grade

Ask = Callable[[JudgeRequest], str]


def grade_request(one: Answered, protocol: str = LLAVA, failures: int = 0) -> JudgeRequest:
    """What the judge is asked about an answer.

    Args:
        one: its record has "question" and "answer", with <AND> and <OR> between parts.
        failures: replies so far that were not a grade; each makes the next one freer.
    """
    wanted = str(one.value("answer")).replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    parts = (str(one.value("question")), wanted, as_text(one.text))
    # MM-Vet's row ends in a space, lmms-eval's does not
    if protocol != LLAVA:
        row = f"{MM_VET_LMMS}\n{' | '.join(parts)} |"
        return JudgeRequest(user=row, temperature=_WARMER * failures, max_tokens=_MAX_TOKENS[protocol])
    row = f"{MM_VET}\n{' | '.join((*parts, ''))}"
    # the temperature rises one reply late: the first try again has the first one's
    return JudgeRequest(
        user=row + (MM_VET_AGAIN if failures else ""),
        temperature=_WARMER * max(failures - 1, 0),
        max_tokens=_MAX_TOKENS[protocol],
    )


def parse_grade(reply: str) -> float | None:
    """The grade, 0..1, that a reply begins with; None where it does not begin with one."""
    try:
        grade = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return grade if 0.0 <= grade <= 1.0 else None  # NaN is neither


def grade(one: Answered, ask: Ask, protocol: str = LLAVA) -> float:
    """An answer's grade, 0..1; 0 where five replies (four of lmms-eval) are not a grade.

    Args:
        ask: the judge's reply to a request.
    """
    for failures in range(_MAX_TRIES[protocol]):
        found = parse_grade(ask(grade_request(one, protocol, failures)))
        if found is not None:
            return found
    return 0.0


def score_mm_vet(answered: Sequence[Answered], grades: Sequence[float]) -> Score:
    """MM-Vet.

    Args:
        answered: records with "capability", a list of rec, ocr, know, gen, spat, math, or one text with commas.
        grades: of each answer, 0..1.

    Returns:
        `total`, percent, and as categories each capability and each combination of them ("ocr_math").

    Raises:
        UserError: no question, or no capability in a record.
    """
    check_answered(answered)
    capabilities = [_capabilities(one) for one in answered]
    kinds = sorted({name for found in capabilities for name in found})
    by_category = {
        name: {"score": mean(value for value, found in zip(grades, capabilities, strict=True) if name in found) * 100}
        for name in kinds
    }
    for combination in sorted({"_".join(sorted(found)) for found in capabilities if len(found) > 1}):
        values = [
            value for value, found in zip(grades, capabilities, strict=True) if "_".join(sorted(found)) == combination
        ]
        by_category[combination] = {"score": mean(values) * 100}
    return Score(metrics={"total": mean(grades) * 100}, by_category=by_category, right=list(grades), unit="percent")


def _capabilities(one: Answered) -> frozenset[str]:
    value = one.value("capability")
    return frozenset(value.split(",") if isinstance(value, str) else value)
