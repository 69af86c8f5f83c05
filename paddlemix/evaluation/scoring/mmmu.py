"""MMMU: one of several letters, or an open answer that holds the right number or words.

Split: validation, 900 questions, whose answers are public.  Parser: MMMU's own.

Source: MMMU-Benchmark/MMMU, eval/eval_utils.py (commit 51ce7f3), which lmms_eval/tasks/mmmu/utils.py and
_task_utils/mmmu_mcq_utils.py of lmms-eval 0.7.3 repeat.  Both protocols score alike.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

from paddlemix.errors import UserError
from paddlemix.evaluation.scoring.answered import LLAVA, Answered, Score, as_text, check_answered, group, mean

# MMMU's evaluation draws a letter where it finds none, from a generator with this seed.
_SEED = 42
_TRIMMED = ",.!?;:'"
_WORDS_FOR_TEXT = 5  # only in longer answers the options' texts are looked for
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = (":", ",", ".", "!", "?", ";", "'")
# The answer is in lower case already when it is cut, so that of this only the line ends work.
_SENTENCES = re.compile(r"\.\s(?=[A-Z])|\n")
_NUMBERS = tuple(
    re.compile(pattern)
    for pattern in (
        r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,000
        r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1e-3
        r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",  # 1, 1.5, .5
    )
)
_SUBJECT = re.compile(r"^[^_]*_(.+?)_\d+$")

DOMAINS: Mapping[str, tuple[str, ...]] = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        *("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine"),
        *("Pharmacy", "Public_Health"),
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        *("Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power"),
        *("Materials", "Mechanical_Engineering"),
    ),
}


def parse_choice(text: str, options: Mapping[str, str], generator: random.Random) -> str:
    """The letter that an answer chooses: in brackets, before a space, before a period, or by its option's text.

    Args:
        text: the answer.
        options: letter -> text, in order.
        generator: draws the letter where none is found.

    Returns:
        Of several the last; where several letters come before other marks than spaces, the first of the options.
    """
    for mark in _TRIMMED:
        text = text.strip(mark)
    text = f" {text} "
    # how a letter is found         -> how its place is found
    # "(A)"                         -> its last "(A)"
    # "A " or "A."                  -> its last " A "; -1 without one, so that the first of the options wins
    # the option's text (long ones) -> its last occurrence
    found = [letter for letter in options if f"({letter})" in text]
    if found:
        return max(found, key=lambda letter: text.rfind(f"({letter})"))
    # a letter before a space may be the end of a word: "DNA " chooses A
    found = [letter for letter in options if f"{letter} " in text] or [i for i in options if f"{i}." in text]
    if found:
        return max(found, key=lambda letter: text.rfind(f" {letter} "))
    lower = text.lower()
    if len(text.split()) > _WORDS_FOR_TEXT:
        found = [letter for letter, option in options.items() if option.lower() in lower]
    if found:
        return max(found, key=lambda letter: lower.rfind(options[letter].lower()))
    return generator.choice(list(options))


def parse_open(text: str) -> set[str | float]:
    """What an open answer may mean: the ends of its sentences, and the numbers in them."""
    key_parts = _key_parts(text)
    numbers = [number for part in key_parts for pattern in _NUMBERS for number in pattern.findall(part)]
    return {value for found in (*key_parts, *numbers) for value in normalise(found)}


def _key_parts(text: str) -> list[str]:
    """The shortest end after an indicator of each line; the whole answer where there is none."""
    text = text.strip().strip(".").lower()
    parts = _SENTENCES.split(text)
    found = []
    for place, part in enumerate(parts):
        # the last line may be an equation
        indicators = (*_INDICATORS, "=") if place == len(parts) - 1 else _INDICATORS
        ends = [part.split(indicator)[-1].strip() for indicator in indicators if indicator in part]
        end = _shortest(ends)
        if end and end not in _TRIVIAL:
            found.append(end)
    return found or [text]


def _shortest(ends: Sequence[str]) -> str:
    """The first of the shortest; an empty one is replaced by the next, as `not ""` is true in the original."""
    chosen = ""
    for end in ends:
        if not chosen or len(end) < len(chosen):
            chosen = end
    return chosen


def normalise(text: str) -> list[str] | list[float]:
    """A number rounded to two decimals, or a text in lower case; of one character with a space on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def is_right_open(text: str, answers: str | Sequence[str]) -> bool:
    """Whether an open answer has one of the right texts within it, or one of the right numbers."""
    wanted = [value for answer in ([answers] if isinstance(answers, str) else answers) for value in normalise(answer)]
    texts = [value for value in wanted if isinstance(value, str)]
    said = parse_open(text)
    if any(isinstance(value, float) and value in wanted for value in said):
        return True
    return any(answer in value for value in said if isinstance(value, str) for answer in texts)


def subject_of(question_id: str) -> str:
    """The subject in a question's name: "Art_Theory" of "validation_Art_Theory_12".

    Raises:
        UserError: it has another form.
    """
    match = _SUBJECT.search(question_id)
    if match is None:
        raise UserError(f"question {question_id!r} does not have the form SPLIT_SUBJECT_NUMBER")
    return match[1]


def score_mmmu(answered: Sequence[Answered], protocol: str = LLAVA) -> Score:
    """MMMU.

    Args:
        answered: question_id as in the data; records with "question_type" ("multiple-choice" or "open"), "options" (a
            list) and "answer" (a letter, a text or several).

    Returns:
        `accuracy`, a share, of all, of each subject and of each domain.

    Raises:
        UserError: no question, or a record lacks a key.
    """
    check_answered(answered, protocol)
    generator = random.Random(_SEED)
    right = [float(_is_right(one, generator)) for one in answered]
    subjects = group(subject_of(str(one.question_id)) for one in answered)
    accuracy = {name: mean(right[place] for place in places) for name, places in subjects.items()}
    domains = {
        name: [right[place] for part in parts for place in subjects.get(part, ())] for name, parts in DOMAINS.items()
    }
    by_category = {name: {"accuracy": mean(values)} for name, values in domains.items() if values}
    by_category |= {name: {"accuracy": value} for name, value in accuracy.items()}
    return Score(metrics={"accuracy": mean(right)}, by_category=by_category, right=right)


def _is_right(one: Answered, generator: random.Random) -> bool:
    text, answer = as_text(one.text), one.value("answer")
    if one.value("question_type") != "multiple-choice":
        return is_right_open(text, answer)
    options = {chr(ord("A") + place): str(option) for place, option in enumerate(one.value("options"))}
    chosen = parse_choice(text, options, generator)
    return chosen == answer if isinstance(answer, str) else chosen in answer
