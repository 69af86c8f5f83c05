"""VQA answers: made plain before they are compared, and their soft accuracy against ten people's answers.

TextVQA, VQAv2 and VizWiz; the last two only where references are public, else their servers score.

Source: llava/eval/{eval_textvqa,m4c_evaluator}.py of llava-torch 1.2.2.post1; for "lmms-eval" tasks/{textvqa,vqav2,
vizwiz_vqa}/utils.py of lmms-eval 0.7.3.
"""

from __future__ import annotations

import functools
import re
import statistics
from collections.abc import Sequence

from paddlemix.errors import UserError
from paddlemix.evaluation.scoring.answered import LLAVA, Answered, Score, as_text, check_answered, mean, means_by
from paddlemix.evaluation.scoring.vqa_words import ARTICLES, CONTRACTIONS, NUMBERS, PUNCTUATION

# Meant as "not after a digit", but `(?!<=` looks ahead for the two characters "<=": every period that no digit follows
# matches, so that "3.5" keeps its period and "3." does not.
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
# The scorer passes `re.UNICODE`, which is 32, where `sub` takes the number of replacements: later periods stay.
_PERIODS = int(re.UNICODE)
_COMMA_IN_NUMBER = re.compile(r"(?<=\d)(\,)+(?=\d)")
_PEOPLE = 10
_AGREEING = 3  # people whose answer makes it wholly right
_OCR = "Reference OCR token:"
_OLD_PROMPT = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


@functools.lru_cache(maxsize=1 << 16)  # references say the same few things over and over
def process_answer(text: str) -> str:
    """An answer in the plain form in which answers are compared.

    process_answer("The White-House, two!")  # "white house 2"
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return compare_form(text)


def compare_form(text: str) -> str:
    """The later half of `process_answer`, all that lmms-eval does to an answer of VQAv2: commas are still there."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return _plain_words(strip_punctuation(text))


def strip_punctuation(text: str) -> str:
    """A text without punctuation: a mark goes where it touches a space anywhere in the text, else becomes a space.

    "a - b" loses its "-", "White-House" gets a space.  A comma between digits makes every mark go.
    """
    # after `process_answer` has removed the commas the second condition never holds; it does in `compare_form`
    removes_all = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in filter(text.__contains__, PUNCTUATION):
        # both conditions look at the text as it came, not at what earlier marks have left of it
        touches_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if touches_space or removes_all else " ")
    return _PERIOD.sub("", result, count=_PERIODS)


def _plain_words(text: str) -> str:
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    # contractions come after articles: nothing that they write is one
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def soft_score(answer: str, references: Sequence[str], process: bool = True) -> float:
    """The mean, over the references, of min(1, n / 3): n of the other references equal the answer.

    Args:
        answer: of the model.
        references: ten people's answers.
        process: whether both are still to be brought into the plain form.

    Returns:
        0, 0.3, 0.6, 0.9 or 1, as floating-point sums have it, for 0 to 4 and more equal ones among ten.

    Raises:
        UserError: there are not ten references.
    """
    if len(references) != _PEOPLE:
        raise UserError(f"VQA accuracy needs {_PEOPLE} reference answers, not {len(references)}")
    if process:
        answer, references = process_answer(answer), [process_answer(reference) for reference in references]
    return mean(_agreements(answer, references))


def _agreements(answer: str, references: Sequence[str]) -> list[float]:
    """Of each reference, how well the answer agrees with the others."""
    equal = [reference == answer for reference in references]
    return [min(1, float(sum(equal) - own) / _AGREEING) for own in equal]


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy for any number of references.

    Returns:
        With ten the soft score; with four and more the same over as many; with fewer whether any equals the answer,
        since three agreeing people are not among the others.
    """
    answer, plain = process_answer(answer), [process_answer(reference) for reference in references]
    return mean(_agreements(answer, plain)) if len(plain) > _AGREEING else float(answer in plain)


def textvqa_question(prompt: str) -> str:
    """The question in a prompt of TextVQA, lower case: with the image's name the key of its references.

    Args:
        prompt: two lines, question and instruction; or three, with a line of OCR tokens before or after the question;
            or the old form "OCR tokens: ... Question: ... Short answer:".

    Raises:
        UserError: it has none of these forms (the official scorer stops there too).
    """
    lines = prompt.split("\n")
    old = _OLD_PROMPT.search(prompt) if prompt.startswith("OCR tokens: ") else None
    # old form                               -> between its words
    # three lines, OCR tokens in one of them -> the other of the first two
    # two lines                              -> the first; an OCR token in it counts as the question's
    if old is not None:
        return old[1].lower()
    if f"{_OCR} " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith(_OCR) else 0].lower()
    if len(lines) == 2:
        return lines[0].lower()
    raise UserError(
        f"the prompt {prompt!r} is not a question and an instruction, with or without a line '{_OCR} ...' between them"
    )


def score_vqa(answered: Sequence[Answered], protocol: str = LLAVA, is_vqav2: bool = False) -> Score:
    """TextVQA and other sets with ten references.

    Args:
        answered: records with "answers"; under "llava" ten of them.
        is_vqav2: the questions are VQAv2's, whose answers lmms-eval processes otherwise; see `lmms_soft_score`.

    Returns:
        `accuracy`, percent; under "lmms-eval" a share.

    Raises:
        UserError: see `soft_score`.
    """
    check_answered(answered, protocol)
    right = [_score_one(one, protocol, is_vqav2) for one in answered]
    factor = 100.0 if protocol == LLAVA else 1.0
    return Score(
        # the official scorer multiplies from the left: `100. * mean`
        metrics={"accuracy": factor * mean(right)},
        by_category=means_by((one.category for one in answered), right, "accuracy", factor),
        right=right,
        unit="percent" if protocol == LLAVA else "share",
    )


def _score_one(one: Answered, protocol: str, is_vqav2: bool) -> float:
    if protocol == LLAVA:
        return soft_score(as_text(one.text), one.value("answers"))
    return lmms_soft_score(as_text(one.text), one.value("answers"), is_vqav2)


def lmms_soft_score(answer: str, references: Sequence[str], is_vqav2: bool = False) -> float:
    """The soft score as lmms-eval has it: any number of references, an exact mean.

    Args:
        is_vqav2: VQAv2's task keeps commas until punctuation is removed; TextVQA's and VizWiz's do not.
    """
    process = compare_form if is_vqav2 else process_answer
    agreements = _agreements(process(answer), [process(reference) for reference in references])
    return float(statistics.mean(agreements)) if agreements else 0.0
