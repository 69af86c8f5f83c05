"""What every scorer reads and returns: questions with their answers, and a score.

A scorer knows no model, no file and no benchmark's folder; it reads `Answered.record`, the benchmark's own record of
the question, for references.  Each names in its docstring the keys that it needs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from paddlemix.errors import UserError

Key = TypeVar("Key", bound=Hashable)

LLAVA, LMMS_EVAL = "llava", "lmms-eval"
PROTOCOLS = (LLAVA, LMMS_EVAL)


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One question of a benchmark and the model's answer.

    Args:
        question_id: as the benchmark's file has it.
        text: the answer; None where there is none.
        prompt: what was asked, as the line of the predictions has it.
        category: the part of the benchmark that it counts for, "" for none.
        image: the picture's name; None for a question without one.
        record: the benchmark's own record: references, choices, kinds.
    """

    question_id: str | int
    text: str | None
    prompt: str = ""
    category: str = ""
    image: str | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    def value(self, key: str) -> Any:
        """A value of the record.

        Raises:
            UserError: the record lacks it.
        """
        if key not in self.record:
            raise UserError(f"question {self.question_id!r} has no '{key}', which its metric needs")
        return self.record[key]


@dataclass(frozen=True, kw_only=True)
class Score:
    """The result of a benchmark.

    Args:
        metrics: by name, as the official scorer names them, in snake case.
        by_category: the same of each category.
        right: how right each question's answer is, 0..1, in the order of the questions.
        unit: of the numbers of `metrics` and `by_category`: "share" (0..1), "percent" (0..100) or "points".
    """

    metrics: Mapping[str, float]
    by_category: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    right: Sequence[bool | float] = ()
    unit: str = "share"


def check_answered(answered: Sequence[Answered], protocol: str = LLAVA) -> None:
    """What every scorer needs.

    Raises:
        UserError: no question, or a protocol that does not exist.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol '{protocol}' is not one of {', '.join(PROTOCOLS)}")
    if not answered:
        raise UserError("there is no question to score")


def group(keys: Iterable[Key]) -> dict[Key, list[int]]:
    """The positions of each key, keys in the order in which they first come."""
    found: dict[Key, list[int]] = {}
    for position, key in enumerate(keys):
        found.setdefault(key, []).append(position)
    return found


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean, summed from left to right as the official scorers do; 0.0 of nothing."""
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def means_by(
    keys: Iterable[Key], values: Sequence[float], name: str, factor: float = 1.0
) -> dict[Key, dict[str, float]]:
    """The mean of each key's values, e.g. {"cat": {"accuracy": 50.0}}; values without a key ("" or None) are left out.

    Args:
        factor: what the mean is multiplied by: 100 for percent.
    """
    return {key: {name: mean(values[place] for place in places) * factor} for key, places in group(keys).items() if key}


def as_text(text: str | None) -> str:
    """An answer, "" where there is none."""
    return text if text is not None else ""
