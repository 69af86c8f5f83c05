"""MathVista: a choice, a whole number, a decimal number or a list.

Split: testmini, 1,000 questions.  Parser: MathVista's own.  It asks a model to extract an answer that is not in its
final form; without one, "The answer is "..."." is read (its `quick_extract`), and whatever else the model said is
taken as the answer: an option by its letter in brackets or by the least edits, a number only where it is nothing else.

Source: lupantech/MathVista, evaluation/{extract_answer,calculate_score}.py, which
lmms_eval/tasks/mathvista/mathvista_evals.py of lmms-eval 0.7.3 repeats.  Both protocols score alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from paddlemix.evaluation.scoring.answered import LLAVA, Answered, Score, as_text, check_answered, mean, means_by
from paddlemix.evaluation.scoring.text_similarity import edit_distance

_QUOTED = re.compile(r'The answer is "(.*)"\.')
_LETTER = re.compile(r"\(([a-zA-Z])\)")
# Keys of a record's metadata whose values are the categories of the published table.
_TABLES = ("task", "category", "context", "grade", "source")


def extract(text: str, problem: Mapping[str, Any]) -> str:
    """The answer in a model's words, as far as it can be read without a judge.

    Args:
        problem: "question_type" ("multi_choice" or "free_form"), "answer_type" ("text", "integer", "float", "list"),
            "choices".
    """
    if problem["question_type"] == "multi_choice" and text in (problem.get("choices") or ()):
        return text
    convert = {"integer": int, "float": float}.get(problem["answer_type"])
    if convert is not None:
        try:
            return str(convert(text))
        except ValueError:
            pass  # in words
    quoted = _QUOTED.search(text)
    return quoted[1] if quoted is not None else text


def normalise(extraction: str, problem: Mapping[str, Any]) -> str | None:
    """An extracted answer in the form of the right ones.

    Args:
        problem: see `extract`; also "precision", decimals of a decimal number.

    Returns:
        The text of an option (of the nearest one where none is named), a number, a list as written; None for what is
        not a number where one is asked for.
    """
    kind = problem["answer_type"]
    if problem["question_type"] == "multi_choice":
        return _choice(extraction.strip(), list(problem["choices"]))
    try:
        if kind == "integer":
            return str(int(float(extraction)))  # cut off, not rounded: 2.9 is 2
        if kind == "float":
            # the precision of a data frame is itself a decimal number
            return str(round(float(extraction), int(problem.get("precision") or 0)))
    except (ValueError, OverflowError):
        return None
    return extraction


def _choice(text: str, choices: Sequence[str]) -> str:
    letter = _LETTER.search(text)
    if letter is not None:
        text = letter[1].upper()
    place = ord(text) - ord("A") if len(text) == 1 else -1
    if 0 <= place < len(choices):
        return choices[place]
    # the first of the nearest: an empty answer chooses the shortest option
    return min(choices, key=lambda choice: edit_distance(text, choice))


def score_mathvista(
    answered: Sequence[Answered], protocol: str = LLAVA, extractions: Mapping[str | int, str] | None = None
) -> Score:
    """MathVista.

    Args:
        answered: records with the keys of `normalise`, "answer", and "metadata" with the categories.
        extractions: of each question_id the answer that a judge has extracted; of others `extract` reads it.

    Returns:
        `accuracy`, percent, of all and of each value of the metadata, as "task/figure question answering".

    Raises:
        UserError: no question, or a record lacks a key.
    """
    check_answered(answered, protocol)
    given = extractions or {}
    right = [float(_is_right(one, given.get(one.question_id))) for one in answered]
    by_category: dict[str, dict[str, float]] = {}
    for key in _TABLES:
        values = [(one.record.get("metadata") or {}).get(key) for one in answered]
        found = means_by(values, right, "accuracy", 100.0)
        by_category |= {f"{key}/{value}": accuracy for value, accuracy in found.items()}
    return Score(metrics={"accuracy": mean(right) * 100.0}, by_category=by_category, right=right, unit="percent")


def _is_right(one: Answered, extraction: str | None) -> bool:
    problem = {key: one.value(key) for key in ("question_type", "answer_type")} | dict(one.record)
    if extraction is None:
        extraction = extract(as_text(one.text).strip(), problem)
    # compared as texts: 1.0 and 1 differ
    return str(normalise(extraction, problem)).strip() == str(one.value("answer")).strip()
