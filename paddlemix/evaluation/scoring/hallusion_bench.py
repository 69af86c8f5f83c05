"""HallusionBench: yes-or-no questions, right by themselves, for a whole figure, and for a question on all its figures.

Split: image, the 951 questions that have a picture.  Parser under "llava": VLMEvalKit's, whose figures XTuner's table
shows (`a_acc`); exactly one of the words yes and no must be in the answer, else it is wrong, since no judge is asked.
Under "lmms-eval": its form without a judge, where a "yes" anywhere makes it a yes and all else is a no.

Source: open-compass/VLMEvalKit, vlmeval/dataset/utils/yorn.py (Hallusion_rating, YOrN_Extraction);
lmms_eval/tasks/hallusion_bench/evaluate_hb.py of lmms-eval 0.7.3 (`hb_aggregation_result_intern`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from paddlemix.evaluation.scoring.answered import LLAVA, Answered, Score, as_text, check_answered, group, mean
from paddlemix.evaluation.scoring.vqa_answers import strip_punctuation

YES, NO, UNKNOWN = "1", "0", "unknown"  # as `gt_answer` has them


def parse_words(text: str) -> str:
    """ "1" where the word yes is in an answer and no is not, "0" the other way round, else "unknown"."""
    words = strip_punctuation(text.lower()).split()
    said = ("yes" in words, "no" in words)
    return {(True, False): YES, (False, True): NO}.get(said, UNKNOWN)


def parse_anywhere(text: str) -> str:
    """ "1" where "yes" is anywhere in an answer ("eyes" too), else "0"."""
    return YES if "yes" in text.lower() else NO


def score_hallusion_bench(answered: Sequence[Answered], protocol: str = LLAVA) -> Score:
    """HallusionBench.

    Args:
        answered: records with "gt_answer" ("0" or "1"), "category" (VD, VS), "subcategory", "set_id", "figure_id",
            "question_id".

    Returns:
        `a_acc` of questions, `f_acc` of figures with all questions right, `q_acc` of questions with all figures right;
        percent, under "lmms-eval" shares; of all, of each category and of each subcategory.

    Raises:
        UserError: no question, or a record lacks a key.
    """
    check_answered(answered, protocol)
    parse = parse_words if protocol == LLAVA else parse_anywhere
    right = [parse(as_text(one.text)) == str(one.value("gt_answer")) for one in answered]
    factor = 100.0 if protocol == LLAVA else 1.0
    by_category = {
        str(name): _accuracies([answered[i] for i in places], [right[i] for i in places], factor)
        for key in ("category", "subcategory")
        for name, places in group(one.value(key) for one in answered).items()
    }
    return Score(
        metrics=_accuracies(answered, right, factor),
        by_category=by_category,
        right=right,
        unit="percent" if protocol == LLAVA else "share",
    )


def _accuracies(answered: Sequence[Answered], right: Sequence[bool], factor: float) -> dict[str, float]:
    def all_right(last_key: str) -> Iterable[float]:
        keys = ("category", "subcategory", "set_id", last_key)
        sets = group(tuple(str(one.value(key)) for key in keys) for one in answered)
        return (float(all(right[place] for place in places)) for places in sets.values())

    return {
        "a_acc": mean(map(float, right)) * factor,
        "f_acc": mean(all_right("figure_id")) * factor,
        "q_acc": mean(all_right("question_id")) * factor,
    }
