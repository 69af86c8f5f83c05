"""Results as a table for a terminal: one line for each metric, the published value beside it, categories below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from paddlemix.evaluation.result_file import Result

_HEADER = ("benchmark", "protocol", "metric", "score", "published", "questions")
_MOST_CATEGORIES = 24  # more are in result.json alone
_NUMBERS = (3, 4, 5)  # columns that are aligned right


def score_table(results: Mapping[str, Result]) -> str:
    """The table, a line each, and below it the tables of categories."""
    rows = [row for name, result in results.items() for row in _rows(name, result)]
    parts = [_aligned([_HEADER, *rows])]
    parts += [_categories(name, result) for name, result in results.items() if result.by_category]
    return "\n\n".join(parts)


def _rows(name: str, result: Result) -> list[tuple[str, ...]]:
    number = _number(result)
    if not result.metrics:
        where = f"submit {result.submission}" if result.scored_by == "server" else "needs a judge (--judge-address)"
        published = "" if result.published is None else f"{result.published:g}"
        return [(name, result.protocol, where, "", published, number)]
    # the headline comes first
    order = sorted(result.metrics, key=lambda metric: metric != result.headline)
    rows: list[tuple[str, ...]] = []
    for place, metric in enumerate(order):
        published = f"{result.published:g}" if place == 0 and result.published is not None else ""
        score = shown(result.metrics[metric], result.unit)
        first = (name, result.protocol) if place == 0 else ("", "")
        rows.append((*first, metric, score, published, number if place == 0 else ""))
    return rows


def _number(result: Result) -> str:
    """How many questions; of how many, where they are not all."""
    if not result.published_questions or result.questions in result.published_questions:
        return str(result.questions)
    return f"{result.questions} of {result.published_questions[0]}"


def shown(value: float, unit: str) -> str:
    """A value as papers print it: percent, or points.

    Args:
        unit: see `Result`.
    """
    return f"{value * 100:.2f}" if unit == "share" else f"{value:.2f}"


def _categories(name: str, result: Result) -> str:
    if len(result.by_category) > _MOST_CATEGORIES:
        return f"{name}: {len(result.by_category)} categories, see result.json"
    metrics = list(dict.fromkeys(metric for values in result.by_category.values() for metric in values))
    rows = [
        (category, *(shown(values[metric], result.unit) if metric in values else "" for metric in metrics))
        for category, values in result.by_category.items()
    ]
    return _aligned([(name, *metrics), *rows], tuple(range(1, len(metrics) + 1)))


def _aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = _NUMBERS) -> str:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = (
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
