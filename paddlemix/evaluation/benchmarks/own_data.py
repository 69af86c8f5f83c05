"""`custom`: any file of a training form, or of questions with references, as a benchmark.

Of a record the last question is asked, and its answer is the reference; a list `references` or `answers` has several.
`category` makes the tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from paddlemix.datasets.forms.parse import parse_question
from paddlemix.datasets.records.record_file import read_records
from paddlemix.errors import UserError
from paddlemix.evaluation.benchmarks.benchmark import Benchmark, BenchmarkData, Question, Request
from paddlemix.evaluation.scoring.answered import Answered, Score
from paddlemix.evaluation.scoring.custom import metric_names, score_custom
from paddlemix.generation.questions import question_names

CUSTOM = "custom"


def custom_benchmark(data: Path, image_root: Path | None, metrics: Sequence[str]) -> Benchmark:
    """The user's own data as a benchmark.

    Args:
        data: the file.
        image_root: folder that relative image paths start from; None for the working directory.
        metrics: their names; the first one is the headline.

    Raises:
        UserError: a metric is not known.
    """
    names = metric_names(metrics)

    def score(answered: Sequence[Answered], protocol: str) -> Score:
        return score_custom(answered, names)

    return Benchmark(
        name=CUSTOM,
        title=f"custom ({data.name})",
        folders=(),
        question_files=(data.name,),
        read=partial(_read, data, image_root),
        score=score,
        published_questions=(),
        headline=names[0],
    )


def _read(path: Path, image_root: Path | None, request: Request) -> BenchmarkData:
    records = read_records(path)
    questions = [_question(records, number, path) for number in range(len(records))]
    return BenchmarkData(questions=questions, files=(path,), image_root=image_root, ids_repeat=True)


def _question(records: Sequence[dict[str, Any]], number: int, path: Path) -> Question:
    record, source = records[number], f"{path} record {number}"
    sample = parse_question(record, source)
    known = _references(record, source)
    asked = sample.messages[-1]
    if asked.role == "assistant":
        asked = sample.messages[-2]
    elif not known:
        raise UserError(
            f"{source} has no reference: neither an answer after its question nor 'references' or 'answers'"
        )
    category = record.get("category")
    return Question(
        question_id=question_names(records, number)[0],
        text=asked.text.strip(),
        images=sample.images,
        category="" if category is None else str(category),
        record={"references": known} if known else {},
        own_record=record,
    )


def _references(record: Mapping[str, Any], source: str) -> list[str]:
    found = record.get("references") or record.get("answers") or record.get("reference") or []
    values = found if isinstance(found, list) else [found]
    # VQA's own form: [{"answer": "red", ...}, ...]
    texts = [value.get("answer") if isinstance(value, Mapping) else value for value in values]
    if not all(isinstance(text, (str, int, float)) for text in texts):
        raise UserError(f"{source}: its references are not texts")
    return [str(text) for text in texts]
