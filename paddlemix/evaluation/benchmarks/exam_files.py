"""MMMU and MathVista: questions of subjects, in the files of their own authors.

MMMU: the validation split of Hugging Face's MMMU/MMMU, a folder with a parquet file for each subject.  MathVista: the
split testmini, annot_testmini.json beside the folder `images` (AI4Math/MathVista, or data/testmini.json of its
repository).

Sources: mmmu/utils/data_utils.py and configs/llava1.5.yaml of MMMU-Benchmark/MMMU; evaluation/build_query.py of
lupantech/MathVista; lmms_eval/tasks/{mmmu,mathvista} of lmms-eval 0.7.3.
"""

from __future__ import annotations

import ast
import base64
from pathlib import Path
from typing import Any

from paddlemix.errors import UserError
from paddlemix.evaluation.benchmarks.benchmark import LETTER, SHORT_ANSWER, BenchmarkData, Question, Request
from paddlemix.evaluation.benchmarks.benchmark_files import check_keys, find_file, read_json
from paddlemix.evaluation.scoring.answered import LLAVA
from paddlemix.evaluation.scoring.mmmu import DOMAINS, subject_of
from paddlemix.evaluation.scoring.optional import import_extra

_MMMU_FILE = "validation-00000-of-00001.parquet"
SUBJECTS = tuple(subject for subjects in DOMAINS.values() for subject in subjects)
MMMU_QUESTIONS = tuple(f"{subject}/{_MMMU_FILE}" for subject in SUBJECTS)
_MMMU_KEYS = ("id", "question", "options", "answer", "question_type")
_MOST_PICTURES = 7
_CHOICE = "multiple-choice"
MATHVISTA_QUESTIONS = ("annot_testmini.json", "testmini.json", "data/testmini.json")
_MATHVISTA_KEYS = ("question", "image", "question_type", "answer_type", "answer")

_ONE_DECIMAL, _TWO_DECIMALS = "one decimal place", "two decimal places"


def read_mmmu(request: Request) -> BenchmarkData:
    """MMMU's validation split.  A question's pictures come before it, in order; its text names them "<image 1>"."""
    paths = [request.folder / name for name in MMMU_QUESTIONS]
    lost = [path.parent.name for path in paths if not path.is_file()]
    if lost:
        raise UserError(f"{request.folder} lacks {len(lost)} of MMMU's 30 subjects: {', '.join(lost)} ({_MMMU_FILE})")
    pictures: dict[str, str] = {}
    questions = []
    for path in paths:
        for row in _parquet_rows(path):
            check_keys(row, _MMMU_KEYS, str(path))
            questions.append(_mmmu_question(row, request.protocol, pictures, path))
    return BenchmarkData(questions=questions, files=paths, pictures=pictures)


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    parquet = import_extra("pyarrow.parquet", f"reading {path}")
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read: {error}; is it whole?") from error
    return rows


def _mmmu_question(row: dict[str, Any], protocol: str, pictures: dict[str, str], path: Path) -> Question:
    names: list[str] = []
    if Path(row["id"]).name != row["id"]:  # it names files
        raise UserError(f"{path}: the id '{row['id']}' is not of the form validation_SUBJECT_NUMBER")
    for number in range(1, _MOST_PICTURES + 1):
        image = row.get(f"image_{number}")
        if image is None:
            continue
        names.append(f"{row['id']}_{number}.png")
        pictures[names[-1]] = base64.b64encode(image["bytes"]).decode("ascii")
    options, answer = _literal(row["options"], row, path), row["answer"]
    if row["question_type"] != _CHOICE:
        answer = _literal(answer, row, path) if answer.startswith("[") else answer
    record = {"question_type": row["question_type"], "options": options, "answer": answer}
    return Question(
        question_id=row["id"],
        text=_mmmu_text(row["question"], row["question_type"], options, protocol),
        images=tuple(names),
        category=subject_of(row["id"]),
        record=record,
    )


def _literal(text: Any, row: dict[str, Any], path: Path) -> list[str]:
    """A list that the table holds as the text of a Python list."""
    try:
        value = ast.literal_eval(text) if isinstance(text, str) else text
    except (ValueError, SyntaxError) as error:
        raise UserError(f"{path}: question {row['id']} has the options {text!r}, expected a list") from error
    return [str(item) for item in value]


def _mmmu_text(question: str, kind: str, options: list[str], protocol: str) -> str:
    if kind != _CHOICE:
        return f"{question}\n\n{SHORT_ANSWER}"
    form = "({}) {}" if protocol == LLAVA else "{}. {}"
    lines = "\n".join(form.format(chr(ord("A") + place), option) for place, option in enumerate(options))
    # MMMU's own prompt puts an empty line before the options, and two after them
    return f"{question}\n\n{lines}\n\n\n{LETTER}" if protocol == LLAVA else f"{question}\n{lines}\n\n{LETTER}"


def read_mathvista(request: Request) -> BenchmarkData:
    """MathVista's testmini, asked for the answer at the end (MathVista's prompt without examples), under lmms-eval for
    the answer alone (`mathvista_testmini_format`)."""
    path = find_file(request.folder, *MATHVISTA_QUESTIONS)
    questions = []
    for number, record in read_json(path, dict).items():
        check_keys(record, _MATHVISTA_KEYS, f"{path}: problem {number}")
        text = _solution_prompt(record) if request.protocol == LLAVA else _format_prompt(record)
        questions.append(
            Question(
                question_id=str(number),
                text=text,
                images=(record["image"],),
                category=str((record.get("metadata") or {}).get("task") or ""),
                record=record,
            )
        )
    root = path.parent if (path.parent / "images").is_dir() else request.folder
    return BenchmarkData(questions=questions, files=(path,), image_root=root)


def _places(record: dict[str, Any]) -> str:
    return _ONE_DECIMAL if int(record.get("precision") or 0) == 1 else _TWO_DECIMALS


def _solution_prompt(record: dict[str, Any]) -> str:
    # the published file has the prompt itself
    if record.get("query"):
        return str(record["query"])
    # kind of the answer -> what is asked for, and an example
    wanted = {
        "integer": ("an integer answer", "value, e.g., 1, 2, 3,"),
        "float": (
            f"a floating-point number with {_places(record)}",
            "value, e.g., 1.2, 1.3, 1.4," if _places(record) == _ONE_DECIMAL else "value, e.g., 1.23, 1.34, 1.45,",
        ),
        "list": ("a Python list as an answer", "list, e.g., [1, 2, 3], [1.2, 1.3, 1.4],"),
    }
    if record["question_type"] == "multi_choice":
        hint = "answer the question and provide the correct option letter, e.g., A, B, C, D,"
    else:
        what, example = wanted[_answer_type(record)]
        hint = f"answer the question requiring {what} and provide the final {example}"
    lines = [f"Hint: Please {hint} at the end.", f"Question: {record['question']}{_unit(record)}"]
    if record.get("choices"):
        lines += [
            "Choices:",
            *(f"({chr(ord('A') + place)}) {choice}" for place, choice in enumerate(record["choices"])),
        ]
    return "\n".join(lines)


def _format_prompt(record: dict[str, Any]) -> str:
    wanted = {
        "integer": "Answer the question using a single integer number.",
        "float": f"Answer the question using a single floating-point number with {_places(record)}.",
        "list": "Answer the question using a Python list.",
    }
    choices = [f"{chr(ord('A') + place)}. {choice}" for place, choice in enumerate(record.get("choices") or ())]
    hint = LETTER if record["question_type"] == "multi_choice" else wanted[_answer_type(record)]
    return "\n".join((f"{record['question']}{_unit(record)}", *choices, hint))


def _unit(record: dict[str, Any]) -> str:
    return f" (Unit: {record['unit']})" if record.get("unit") else ""


def _answer_type(record: dict[str, Any]) -> str:
    kind = str(record["answer_type"])
    if kind not in ("integer", "float", "list"):
        raise UserError(
            f"MathVista problem {record.get('pid')}: answer_type '{kind}' is not one of integer, float, list"
        )
    return kind
