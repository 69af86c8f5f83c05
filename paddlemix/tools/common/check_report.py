"""The findings of `paddlemix check-data` as text for people and as JSON for programs.

Knows no file format; everything comes from a `CheckReport`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paddlemix.cache import replacing
from paddlemix.datasets.checking.check import CheckReport
from paddlemix.datasets.checking.problem_kinds import Problem
from paddlemix.datasets.length_statistics import DataStatistics, describe_lengths, padding_share
from paddlemix.errors import UserError
from paddlemix.tools.common.check_plan import CheckPlan

_EXAMPLES = 3  # of each kind of problem
_WIDTH = 300  # characters of an example; the JSON report has them whole
_BATCH_SIZE = 8
_DEFAULT_LENGTH = 2048  # the configuration's default, for packing if no length is given


@dataclass(frozen=True)
class Lengths:
    """Lengths of the good samples, and the padding of batches of 8 made in three ways.

    Args:
        of_samples: minimum to maximum and image share.
        padding: way of batching -> share of padding, 0..1: "plain", "grouped" by length, "packed" to `capacity`.
        capacity: tokens of a packed row.
    """

    of_samples: DataStatistics
    padding: dict[str, float]
    capacity: int


def measure_statistics(report: CheckReport, max_length: int | None) -> Lengths | None:
    """Statistics of lengths; None if no sample was measured."""
    lengths = report.lengths
    if not len(lengths):
        return None
    # A row holds at least the longest sample.
    capacity = max(max_length or _DEFAULT_LENGTH, int(lengths[:, 0].max()))
    padding = {
        "plain": padding_share(lengths, _BATCH_SIZE),
        "grouped": padding_share(lengths, _BATCH_SIZE, grouping="length"),
        "packed": padding_share(lengths, _BATCH_SIZE, capacity),
    }
    return Lengths(describe_lengths(lengths, _BATCH_SIZE), padding, capacity)


def format_report(report: CheckReport, lengths: Lengths | None, plan: CheckPlan) -> str:
    """The report as lines for a terminal."""
    return "\n".join([*_summary(report, plan), *_length_lines(lengths), *_problem_lines(report)])


def _summary(report: CheckReport, plan: CheckPlan) -> Iterator[str]:
    good = report.records - report.num_bad
    yield f"files       {len(report.files):,}"
    yield f"records     {report.records:,}: {good:,} good, {report.num_bad:,} bad"
    if report.forms:
        yield "forms       " + ", ".join(f"{name} {count:,}" for name, count in report.forms.most_common())
    if report.too_long:
        fate = f"{report.skipped:,} of them are skipped" if report.skipped else "their last turns are dropped"
        yield f"too long    {report.too_long:,} good records have more than {plan.max_length:,} tokens; {fate}"
    if report.duplicates:
        again, first = report.duplicates[0]
        count, plural = len(report.duplicates), "s" * (len(report.duplicates) > 1)
        yield f"duplicates  {count:,} duplicate record{plural}: {again} is the same as {first}"
    yield from (f"note        {note}" for note in plan.notes)


def _length_lines(lengths: Lengths | None) -> Iterator[str]:
    if lengths is None:
        return
    known = lengths.of_samples
    yield (
        f"tokens      min {known.minimum:,}, median {known.median:,}, 95 % {known.p95:,}, max {known.maximum:,}; "
        f"{known.image_share:.1%} of them visual"
    )
    ways = ", ".join(f"{share:.1%} {name}" for name, share in lengths.padding.items())
    yield f"padding     {ways} to {lengths.capacity:,} (batches of {_BATCH_SIZE})"


def _problem_lines(report: CheckReport) -> Iterator[str]:
    if not report.problems and not report.doubts:
        yield "no problem found"
    yield from _kinds("problem", report.problems)
    yield from _kinds("doubt about records that are used", report.doubts)


def _kinds(title: str, problems: list[Problem]) -> Iterator[str]:
    if problems:
        yield ""
        yield f"{'count':>8}  {title}"
    for problem in problems:
        yield f"{problem.count:8,}  {_short(problem.kind)}"
        for source, message in problem.records[:_EXAMPLES]:
            yield f"{'':12}{_short(f'{source}: {message}')}"


def _short(text: str) -> str:
    # Messages quote data: control characters must not reach the terminal.
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return line if len(line) <= _WIDTH else f"{line[:_WIDTH]}..."


def report_values(report: CheckReport, lengths: Lengths | None, plan: CheckPlan) -> dict[str, Any]:
    """The report as JSON values; nothing is shortened."""
    return {
        "files": [file.path for file in report.files],
        "records": report.records,
        "good": report.records - report.num_bad,
        "bad": report.num_bad,
        "unreadable_files": report.unreadable,
        "forms": dict(report.forms),
        "problems": _problem_values(report.problems),
        "doubts": _problem_values(report.doubts),
        "duplicates": [{"source": again, "first": first} for again, first in report.duplicates],
        "statistics": {
            "max_length": plan.max_length,
            "too_long": report.too_long,
            "skipped": report.skipped,
            **(_length_values(lengths) if lengths is not None else {}),
        },
        "notes": plan.notes,
    }


def _problem_values(problems: list[Problem]) -> list[dict[str, Any]]:
    return [
        {
            "kind": problem.kind,
            "count": problem.count,
            "records": [{"source": source, "message": message} for source, message in problem.records],
        }
        for problem in problems
    ]


def _length_values(lengths: Lengths) -> dict[str, Any]:
    known = asdict(lengths.of_samples)
    kept = ("samples", "tokens", "minimum", "median", "p95", "maximum", "image_share")
    return {
        **{key: known[key] for key in kept},
        "padding_share": lengths.padding,
        "batch_size": _BATCH_SIZE,
        "packed_to": lengths.capacity,
    }


def is_report(path: Path) -> bool:
    """Whether a file is a report of an earlier check."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and values.keys() >= {"files", "records", "good", "bad", "problems", "statistics"}


def write_report(path: Path, report: CheckReport, lengths: Lengths | None, plan: CheckPlan) -> None:
    """Writes the JSON report, completely or not at all.

    Raises:
        UserError: it cannot be written.
    """
    text = json.dumps(report_values(report, lengths, plan), indent=2)
    if not path.parent.is_dir():
        raise UserError(f"--report {path}: the folder {path.parent} does not exist")
    # Checked here again: the folder may have gone while data were checked.
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
