"""MMBench and CCBench: a question is right where every rotation of its options is answered rightly (CircularEval).

Rows of one question have indices that are equal modulo 1,000,000; the row below that is the question itself.  Without
a judge an answer in which no option is found is wrong; the official server asks one then.

Source: open-compass/MMBench's evaluation, whose rules lmms_eval/tasks/mmbench/mmbench_evals.py and
_task_utils/mcq_extract.py of lmms-eval 0.7.3 ("static") keep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from paddlemix.evaluation.scoring.answered import LLAVA, Answered, Score, as_text, check_answered, mean, means_by

ROTATION = 1_000_000  # what the index of a rotated row exceeds its question's by, or a multiple of it
LETTERS = "ABCD"
# E is looked for too: the letter of "none of them"
_READ = "ABCDE"
_QUANTIFIED = 3  # in more words than these a lone "A" may be an article
_FAILED = "Failed to obtain answer via API"
# What a letter may stand between, tried in this order.
_WRAPPED = (
    *(("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ").")),
    *((":", ""), (":", ","), (":", "."), (":", ")"), (":", ").")),
)

_TRIMMED = (",", ".", "!", "?", ";", ":", "'", '"')
_PHRASES = (
    *("the answer is", "answer is", "the correct answer is", "correct answer is", "the best answer is"),
    *("best answer is", "the correct option is", "correct option is", "the best option is", "best option is"),
    *("the choice is", "choice is", "the correct choice is", "correct choice is", "i choose", "i select", "i pick"),
    *("my answer is", "my choice is", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
# The form of a letter and how much it is believed.
_FORMS = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))
_AT_START, _AT_END, _AFTER_PHRASE, _ANYWHERE = 10, 9, 7, 0


def infer_option(text: str) -> str | None:
    """The one letter, A to E, that is a word of an answer, alone or within the usual marks."""
    if _FAILED in text:
        return None
    words = text.split()
    found = [letter for letter in _READ if letter in words]
    # "A" in a longer answer is left to the marks below, where "A" alone has none: it ends in the options' texts
    if len(found) == 1 and not (found[0] == "A" and len(words) > _QUANTIFIED):
        return found[0]
    for before, after in _WRAPPED:
        found = [letter for letter in _READ if f"{before}{letter}{after}" in words]
        if len(found) == 1:
            return found[0]
    return None


def infer_text(text: str, options: Mapping[str, object]) -> str | None:
    """The letter of the one option whose text is part of an answer, whatever the case."""
    lower = text.lower()
    found = [letter for letter, option in options.items() if str(option).lower() in lower]
    return found[0] if len(found) == 1 else None


def infer(text: str, options: Mapping[str, object]) -> str | None:
    """The option that an answer chooses, by its letter, else by its text; None where that is not plain."""
    return infer_option(text) or infer_text(text, options)


def extract_letter(text: str, letters: Sequence[str]) -> str:
    """lmms-eval's reading of whatever `infer` does not read: the best believed form of a letter, the last of equals.

    Returns:
        "" where no letter is found.
    """
    trimmed = text.strip()
    for mark in _TRIMMED:
        trimmed = trimmed.strip(mark)
    if not text.strip():
        return ""
    padded = f" {trimmed} "
    found = _marked(padded, letters) + _after_phrases(padded, letters) + _at_ends(padded, letters)
    if not found:
        found = [(_ANYWHERE, padded.rfind(letter), letter) for letter in letters if letter in padded]
    # `max` returns the first of equals, as a stable sort in descending order puts it first
    return max(found, key=lambda one: one[:2])[2] if found else ""


def _marked(text: str, letters: Sequence[str]) -> list[tuple[int, int, str]]:
    forms = ((weight, form.format(letter), letter) for form, weight in _FORMS for letter in letters)
    return [(weight, text.rfind(marked), letter) for weight, marked, letter in forms if marked in text]


def _after_phrases(text: str, letters: Sequence[str]) -> list[tuple[int, int, str]]:
    """Every letter that comes anywhere after a phrase, even inside of a word."""
    found, lower = [], text.lower()
    for phrase in _PHRASES:
        start = lower.find(phrase)
        if start >= 0:
            places = ((text.find(letter, start + len(phrase)), letter) for letter in letters)
            found += [(_AFTER_PHRASE, place, letter) for place, letter in places if place >= 0]
    return found


def _at_ends(padded: str, letters: Sequence[str]) -> list[tuple[int, int, str]]:
    text = padded.strip()
    first = [(_AT_START, 0, letter) for letter in letters if text[:1] == letter and not text[1:2].isalpha()]
    last = [
        (_AT_END, len(padded) - 1, letter) for letter in letters if text[-1:] == letter and not text[-2:-1].isalpha()
    ]
    return first + last


def options_of(row: Mapping[str, object]) -> dict[str, object]:
    """The options A to D of a row that have a value; NaN is none, "nan" is a text."""
    # NaN differs from itself
    return {letter: row[letter] for letter in LETTERS if row.get(letter) is not None and row[letter] == row[letter]}


def score_mmbench(answered: Sequence[Answered], protocol: str = LLAVA) -> Score:
    """MMBench with public answers, or CCBench.

    Args:
        answered: the question_id is the row's index; records with "answer" (a letter) and the options "A" to "D"; for
            the tables "category" and "l2-category".

    Returns:
        `accuracy` (CircularEval), `row_accuracy` (each row by itself), percent; of each category and l2-category their
        `accuracy`, the latter as "l2-category/NAME".  `right` is of rows.

    Raises:
        UserError: no question, or a record lacks an answer.
    """
    check_answered(answered, protocol)
    row_right = [float(_is_right(one, protocol)) for one in answered]
    of_question: dict[int, list[float]] = {}
    for one, right in zip(answered, row_right, strict=True):
        of_question.setdefault(int(one.question_id) % ROTATION, []).append(right)
    # a rotation without its question, as a first part of the rows may have, counts for nothing
    mains = [one for one in answered if int(one.question_id) < ROTATION]
    hits = [min(of_question[int(one.question_id)]) for one in mains]
    categories = means_by((one.record.get("category") or one.category for one in mains), hits, "accuracy", 100.0)
    wider = means_by((one.record.get("l2-category") for one in mains), hits, "accuracy", 100.0)
    return Score(
        metrics={"accuracy": mean(hits) * 100.0, "row_accuracy": mean(row_right) * 100.0},
        by_category={**categories, **{f"l2-category/{name}": values for name, values in wider.items()}},
        right=row_right,
        unit="percent",
    )


def _is_right(one: Answered, protocol: str) -> bool:
    # the evaluation turns every prediction into a text, a missing one into ""
    text, options = as_text(one.text), options_of(one.record)
    chosen = infer(text, options)
    if chosen is None and protocol != LLAVA:
        chosen = extract_letter(text, sorted(options))
    return chosen == one.value("answer")
