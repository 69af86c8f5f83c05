"""MMBench and CCBench: tables with pictures in base64, one row for each rotation of a question's options.

Both kinds of tables are read: those that repeat a picture in each row, and VLMEvalKit's, where other rows hold the
index of the row that has it.

Sources: llava/eval/model_vqa_mmbench.py, scripts/convert_mmbench_for_submission.py of haotian-liu/LLaVA (commit
c121f04); vlmeval/dataset/image_base.py of open-compass/VLMEvalKit; lmms_eval/tasks/mmbench of lmms-eval 0.7.3.
"""

from __future__ import annotations

import base64
import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paddlemix.errors import UserError
from paddlemix.evaluation.benchmarks.benchmark import (
    LETTER,
    LETTER_CN,
    Answers,
    BenchmarkData,
    Question,
    Request,
    Submission,
)
from paddlemix.evaluation.benchmarks.benchmark_files import find_file
from paddlemix.evaluation.scoring.answered import LLAVA
from paddlemix.evaluation.scoring.mmbench import LETTERS, ROTATION
from paddlemix.evaluation.scoring.submissions import mmbench_submission, write_xlsx
from paddlemix.table_files import opened_table

Row = dict[str, Any]

_MAX_CELL = 256 * 1024**2  # characters: a picture in base64
_LONGEST_INDEX = 64  # characters: a longer cell is a picture, not the index of one
# What pandas, by which the official scripts read tables, takes for an empty cell.
_EMPTY = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA")
) | {"NULL", "NaN", "None", "n/a", "nan", "null"}
_NEEDED = ("index", "question", "A", "B", "image")
_EXTENSIONS = ((b"\x89PNG", "png"), (b"GIF8", "gif"), (b"RIFF", "webp"))
_BASE64_START = 16  # characters, whose bytes tell the format


@dataclass(frozen=True, kw_only=True)
class Wording:
    """The words around a question's options.

    Args:
        letter: LLaVA's request for a letter, after the options.
        options: lmms-eval's line before them.
        lmms_letter: lmms-eval's request.
        has_hint: whether lmms-eval asks with the hint.
    """

    letter: str
    options: str
    lmms_letter: str
    has_hint: bool = True


ENGLISH = Wording(letter=LETTER, options="There are several options:", lmms_letter=LETTER)
# lmms-eval's Chinese tasks read the settings of the English one, and so have its line before the options
CHINESE = Wording(letter=LETTER_CN, options=ENGLISH.options, lmms_letter="请直接使用所提供的选项字母作为答案回答。")
CHINESE_CULTURE = Wording(letter=LETTER_CN, options=CHINESE.options, lmms_letter=CHINESE.lmms_letter, has_hint=False)


def read_table(path: Path) -> tuple[list[str], list[Row]]:
    """The columns and the rows of a table with tabs; empty cells are None, `index` is a number.

    Raises:
        MissingFileError: it does not exist.
        UserError: it is broken, or lacks a column.
    """
    with opened_table(path, _MAX_CELL) as file:
        lines = csv.reader(file, delimiter="\t")
        columns = next(lines, [])
        missing = [name for name in _NEEDED if name not in columns]
        if missing:
            raise UserError(f"'{path}' has no column {', '.join(missing)} (columns: {', '.join(columns)})")
        return columns, [_row(columns, cells, f"'{path}' row {number}") for number, cells in enumerate(lines, 1)]


def _row(columns: Sequence[str], cells: Sequence[str], source: str) -> Row:
    if len(cells) != len(columns):
        raise UserError(f"{source} has {len(cells)} cells, the header {len(columns)}; is the file whole?")
    row: Row = {name: None if cell in _EMPTY else cell for name, cell in zip(columns, cells, strict=True)}
    if not (row["index"] or "").isdecimal() or row["question"] is None or row["image"] is None:
        raise UserError(f"{source} has no index, question or image")
    row["index"] = int(row["index"])
    return row


def read_mmbench(request: Request, files: Sequence[str], wording: Wording) -> BenchmarkData:
    """A table of MMBench's kind.  Without a column `answer` it is a test set, which only a server scores.

    Args:
        files: names of the table.
    """
    path = find_file(request.folder, *files)
    columns, rows = read_table(path)
    pictures: dict[str, str] = {}
    by_index = {row["index"]: row for row in rows}
    questions, records = [], []
    for row in rows:
        name, content = _picture(row, by_index, path)
        pictures[name] = content
        text = _llava_text(row, wording) if request.protocol == LLAVA else _lmms_text(row, wording)
        # without the picture, which is large: neither scorers nor servers look at it
        record = {key: value for key, value in row.items() if key != "image" and value is not None}
        records.append(record)
        questions.append(
            Question(
                question_id=row["index"],
                text=text,
                images=(name,),
                category=str(row.get("category") or ""),
                record=record,
                unit=row["index"] % ROTATION,
            )
        )
    has_answers = "answer" in columns and all(row["answer"] is not None for row in rows)

    def write(target: Path, answers: Answers) -> None:
        write_xlsx(target, *mmbench_submission(columns, records, answers))

    return BenchmarkData(
        questions=questions,
        files=(path,),
        pictures=pictures,
        has_references=has_answers,
        submission=Submission(name=f"{path.stem}.xlsx", write=write, module="openpyxl"),
    )


def _picture(row: Row, by_index: Mapping[int, Row], path: Path) -> tuple[str, str]:
    """Name and content of a row's picture; equal pictures have one name."""
    content = row["image"]
    if len(content) <= _LONGEST_INDEX:
        # the index of the row that holds it; that one has it itself
        source = by_index.get(int(content)) if content.isdecimal() else None
        if source is None or len(source["image"]) <= _LONGEST_INDEX:
            raise UserError(
                f"'{path}' index {row['index']}: image '{content}' is neither a picture nor the index of a row with one"
            )
        content = source["image"]
    digest = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
    return f"{digest}.{_extension(content)}", content


def _extension(content: str) -> str:
    try:
        start = base64.b64decode(content[:_BASE64_START])
    except ValueError:
        start = b""  # said when the picture is written
    return next((extension for mark, extension in _EXTENSIONS if start.startswith(mark)), "jpg")


def _options(row: Row) -> dict[str, str]:
    """The options up to the first that is empty; "none" and "nan" are empty too."""
    options: dict[str, str] = {}
    for letter in LETTERS:
        value = row.get(letter)
        if value is None or value.lower() in ("nan", "none"):
            break
        options[letter] = value
    return options


def _llava_text(row: Row, wording: Wording) -> str:
    hint = row.get("hint")
    before = [] if hint is None or hint.lower() in ("nan", "none") else [hint]
    options = (f"{letter}. {value}" for letter, value in _options(row).items())
    return "\n".join((*before, row["question"], *options, wording.letter))


def _lmms_text(row: Row, wording: Wording) -> str:
    hint = row.get("hint") if wording.has_hint else None
    # all options that have a value, E too, whatever comes before them
    given = [f"{letter}. {row[letter]}" for letter in f"{LETTERS}E" if row.get(letter) is not None]
    question = f"{row['question']} " + "\n".join((wording.options, *given))
    # two line ends: one of the prompt, one of the request
    return f"{question if hint is None else f'{hint} {question}'}\n\n{wording.lmms_letter}"
