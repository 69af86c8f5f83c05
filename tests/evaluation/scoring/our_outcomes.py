"""What our scorers make of the generated cases, in the form of the golden file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from paddlemix.evaluation.scoring.answered import LMMS_EVAL, Answered
from paddlemix.evaluation.scoring.mmbench import extract_letter, infer, infer_option, options_of
from paddlemix.evaluation.scoring.mme import parse_lmms
from paddlemix.evaluation.scoring.pope import parse_yes_no
from paddlemix.evaluation.scoring.science_qa import parse_letter, score_science_qa
from paddlemix.evaluation.scoring.seed import score_seed
from paddlemix.evaluation.scoring.submissions import mmbench_submission
from paddlemix.evaluation.scoring.vqa_answers import compare_form, lmms_soft_score, process_answer, soft_score
from tests.evaluation.scoring.generated import MMBENCH_COLUMNS, Case, mmbench_answers, mmbench_rows, parts

NOT_A_VALUE = ("", "nan")  # texts of the generated options that pandas reads as an empty cell


def vqa(found: list[Case]) -> dict[str, list[Any]]:
    """Processed answers and soft scores."""
    return {
        "processed": [process_answer(case["text"]) for case in found],
        "score": [soft_score(case["text"], case["answers"]) for case in found],
        "lmms_score": [lmms_soft_score(case["text"], case["answers"]) for case in found],
        "vqav2_lmms": [
            [compare_form(case["text"]), lmms_soft_score(case["text"], case["answers"], is_vqav2=True)]
            for case in found
        ],
    }


def pope(found: list[Case]) -> dict[str, list[Any]]:
    """Yes or no."""
    return {"said": [parse_yes_no(case["text"]) for case in found]}


def science_questions(found: list[Case]) -> list[Answered]:
    """The cases as questions with answers."""
    return [
        Answered(
            question_id=str(number),
            text=case["text"],
            prompt="<image>\nQ" if case["has_image"] else "Q",
            image="a.png" if case["has_image"] else None,
            record={"choices": case["choices"], "answer": case["answer"]},
        )
        for number, case in enumerate(found)
    ]


def science_qa(found: list[Case]) -> dict[str, list[Any]]:
    """The letter of each answer, and whether it is right."""
    asked = science_questions(found)
    return {
        "letter": [parse_letter("FAILED" if case["text"] is None else case["text"]) for case in found],
        "right": [bool(value) for value in score_science_qa(asked).right],
        "lmms": list(score_science_qa(asked, LMMS_EVAL).right),
    }


def mme(found: list[Case]) -> dict[str, list[Any]]:
    """What lmms-eval reads in each answer."""
    return {"lmms": [parse_lmms(text) for case in found for text in case["texts"]]}


def seed_questions(found: list[Case]) -> list[Answered]:
    """The cases as questions with answers."""
    return [
        Answered(question_id=number, text=case["text"], category=f"type {case['type']}", record=case)
        for number, case in enumerate(found)
    ]


def seed(found: list[Case]) -> dict[str, list[Any]]:
    """Whether each answer is right for lmms-eval."""
    return {"lmms": [bool(value) for value in score_seed(seed_questions(found), LMMS_EVAL).right]}


def mmbench(found: list[Case]) -> dict[str, list[Any]]:
    """The option that each row's answer chooses."""
    rows = [(row["text"], options_of(row)) for case in found for row in case["rows"]]
    return {
        "option": [infer_option(text) for text, _ in rows],
        "inferred": [infer(text, options) for text, options in rows],
        "extracted": [extract_letter(text, sorted(options)) for text, options in rows],
        "sheets": [line for part in parts(found, 500) for line in sheet(part)],
    }


def sheet(part: Sequence[Case]) -> list[list[Any]]:
    """The cells of the table for MMBench's server."""
    rows = mmbench_rows(part)
    answers = dict(mmbench_answers(rows))
    read = [{key: None if value in NOT_A_VALUE else value for key, value in row.items()} for row in rows]
    header, cells = mmbench_submission(MMBENCH_COLUMNS, read, answers)
    # an empty text is an empty cell when the file is read
    return [header, *([None if value == "" else value for value in line] for line in cells)]


OUTCOMES: dict[str, Callable[[list[Case]], dict[str, list[Any]]]] = {
    "vqa": vqa,
    "pope": pope,
    "science_qa": science_qa,
    "mme": mme,
    "seed": seed,
    "mmbench": mmbench,
}
