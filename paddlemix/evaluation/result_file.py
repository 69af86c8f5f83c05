"""`result.json`: for each benchmark its score and everything that repeats it; no time, so that equal runs have equal
files.

    {"pope": {"protocol": "llava", "metrics": {...}, "by_category": {...}, "questions": 8910, ..., "made_with": {...}}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from paddlemix.cache import replacing
from paddlemix.errors import UserError
from paddlemix.file_locks import one_at_a_time
from paddlemix.json_files import parse_json, read_text
from paddlemix.locks import write_errors

RESULT_FILE = "result.json"
_LOCK = ".result.lock"


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of one benchmark; its fields are the keys of `result.json`.

    Args:
        protocol: whose prompts and rules.
        metrics: by the official scorer's names in snake case; {} where the score comes from elsewhere.
        by_category: the same of each category.
        unit: of the numbers: "share" (0..1), "percent" or "points".
        headline: the metric that papers print.
        questions: number of questions.
        limit: they are the first ones of the benchmark; None for all.
        published_questions: number of questions of the published version, or of each of several.
        published: the printed value of the same model's headline metric, percent or points; None where there is none.
        scored_by: "paddlemix", "server" (the file is at `submission`), or "judge NAME"; None before a judge is asked.
        submission: file for a server or another program, beside the predictions.
        made_with: model, settings, template, checksums of the data, versions.
    """

    protocol: str
    metrics: Mapping[str, float]
    by_category: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    unit: str = "share"
    headline: str = "accuracy"
    questions: int
    limit: int | None
    published_questions: tuple[int, ...] = ()
    published: float | None = None
    scored_by: str | None = "paddlemix"
    submission: str | None = None
    made_with: Mapping[str, Any] = field(default_factory=dict)


def read_results(output: Path) -> dict[str, Any]:
    """What `result.json` of a folder holds; {} where there is none.

    Raises:
        UserError: it is not such a file.
    """
    path = output / RESULT_FILE
    if not path.exists():
        return {}
    try:
        found = parse_json(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"'{path}' is not JSON ({error}); remove it, and score again with --score-only") from error
    if not isinstance(found, dict) or not all(isinstance(value, dict) for value in found.values()):
        raise UserError(f"'{path}' was not written by this command; choose another --output")
    return found


def add_result(output: Path, name: str, result: Result) -> None:
    """Puts a benchmark's result into `result.json`; those of other benchmarks stay.

    Raises:
        UserError: the file is not ours, or cannot be written.
    """
    with write_errors(f"'{output / RESULT_FILE}'"), one_at_a_time(output / _LOCK):
        results = read_results(output) | {name: asdict(result)}
        with replacing(output / RESULT_FILE) as temporary:
            # sorted: the file does not depend on which benchmark was done first
            text = json.dumps(dict(sorted(results.items())), ensure_ascii=False, indent=2)
            temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
