"""Files for servers and scripts that score: VQAv2, VizWiz, GQA, SEED-Bench, MM-Vet as values, MMBench as a table.

Source: scripts/convert_{vqav2,vizwiz,seed,mmbench}_for_submission.py, convert_{gqa,mmvet}_for_eval.py of
haotian-liu/LLaVA (commit c121f04).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paddlemix.cache import replacing
from paddlemix.errors import UserError
from paddlemix.evaluation.scoring.gqa import gqa_prediction
from paddlemix.evaluation.scoring.optional import import_extra
from paddlemix.evaluation.scoring.seed import seed_key
from paddlemix.evaluation.scoring.vqa_answers import process_answer

Answers = Mapping[str | int, str]
Cell = str | int | float | None

# Columns of MMBench's table that its server does not want; newer tables lack some.
_DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
_PREDICTION, _PLACE = "prediction", 6
# Characters that XML, and so a sheet, cannot hold; Excel's own escape for them is _xHHHH_.
_ILLEGAL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")


def vqav2_submission(question_ids: Iterable[str | int], answers: Answers) -> list[dict[str, Any]]:
    """The answers to all questions of test2015, "" to those that were not asked."""
    return [
        {"question_id": one, "answer": process_answer(answers[one]) if one in answers else ""} for one in question_ids
    ]


def vizwiz_submission(questions: Iterable[tuple[str | int, str]], answers: Answers) -> list[dict[str, Any]]:
    """The answers by image.

    Args:
        questions: (question_id, image) of all questions.

    Raises:
        UserError: a question has no answer; the server takes only whole files.
    """
    lines = []
    for question_id, image in questions:
        if question_id not in answers:
            raise UserError(
                f"question {question_id!r} has no answer, and VizWiz takes only the answers to all questions"
            )
        lines.append({"image": image, "answer": process_answer(answers[question_id])})
    return lines


def gqa_submission(answers: Answers) -> list[dict[str, Any]]:
    """testdev_balanced_predictions.json, which GQA's eval.py reads."""
    return [{"questionId": one, "prediction": gqa_prediction(text)} for one, text in answers.items()]


def seed_submission(question_ids: Iterable[str | int], answers: Answers) -> list[dict[str, Any]]:
    """Lines for SEED-Bench's leaderboard.

    Raises:
        UserError: a question has no answer.
    """
    lines = []
    for question_id in question_ids:
        text = answers.get(question_id, answers.get(seed_key(question_id)))
        if text is None:
            raise UserError(
                f"question {question_id!r} has no answer, and SEED-Bench takes only the answers to all questions"
            )
        lines.append({"question_id": question_id, "prediction": text})
    return lines


def mmvet_submission(answers: Answers) -> dict[str, str]:
    """MM-Vet's file of answers, which its own page and script score."""
    return {f"v1_{question_id}": text for question_id, text in answers.items()}


def mmbench_submission(
    columns: Sequence[str], rows: Iterable[Mapping[str, Any]], answers: Answers
) -> tuple[list[str], list[list[Cell]]]:
    """MMBench's table with the answers.

    Args:
        columns: of the TSV, in order.
        rows: of the TSV; NaN and None are empty cells.
        answers: by the rows' "index".

    Returns:
        The header and the cells: what the server wants, with "prediction" as the seventh column, empty for rows
        without an answer.
    """
    kept = [name for name in columns if name not in _DROPPED]
    place = min(_PLACE, len(kept))
    header = [*kept[:place], _PREDICTION, *kept[place:]]
    filled = ({**row, _PREDICTION: answers.get(row["index"])} for row in rows)
    return header, [[_cell(row.get(name)) for name in header] for row in filled]


def _cell(value: Any) -> Cell:
    # NaN, pandas' mark of an empty cell, differs from itself
    return None if value is None or value != value else value


def write_xlsx(path: Path, header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """A table as an Excel file of one sheet.

    A text stays a text, also one that begins with "=".  Characters that a sheet cannot hold are written as Excel
    escapes them; the official script stops there.

    Raises:
        UserError: openpyxl is not installed, or the file cannot be written.
    """
    openpyxl = import_extra("openpyxl", f"writing {path}")
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    for row in (header, *rows):
        sheet.append([_sheet_cell(openpyxl, sheet, value) for value in row])
    written = io.BytesIO()
    book.save(written)
    with replacing(path) as temporary:
        temporary.write_bytes(written.getvalue())


def _sheet_cell(openpyxl: Any, sheet: Any, value: Cell) -> Any:
    if not isinstance(value, str):
        return value
    cell = openpyxl.cell.WriteOnlyCell(sheet)
    cell.value = _ILLEGAL.sub(lambda found: f"_x{ord(found[0]):04X}_", value)
    if cell.data_type == "f":  # a text that looks like a formula would be computed
        cell.data_type = "s"
    return cell
