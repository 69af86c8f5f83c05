"""Error messages of many records grouped by kind: what is particular to one record is removed from its message.

Knows no data; a kind is a text such as "image '...' does not exist".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

# In this order: brackets may hold quotes, quotes may hold numbers.
_PARTICULAR = (
    (re.compile(r"; did you mean .*", re.DOTALL), ""),
    (re.compile(r"\s*\([^()]*\)"), ""),
    (re.compile(r"'(?:[^'\\]|\\.)*'"), "'...'"),
    (re.compile(r'"(?:[^"\\]|\\.)*"'), '"..."'),
    (re.compile(r"\[.*\]", re.DOTALL), "[...]"),
    (re.compile(r"(?<![A-Za-z_])-?\d[\d,.]*(?=\W|$)"), "N"),
)


@dataclass
class Problem:
    """Messages of one kind.

    Args:
        kind: the message without what is particular to a record.
        records: (source, message) of each, in the order of the data; the source is a record or a file.
    """

    kind: str
    records: list[tuple[str, str]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many records have it."""
        return len(self.records)


def kind_of(message: str) -> str:
    """The kind of a message: quoted values, lists and numbers become '...', [...] and N, remarks in brackets go."""
    for pattern, placeholder in _PARTICULAR:
        message = pattern.sub(placeholder, message)
    return " ".join(message.split())


def group_problems(messages: Iterable[tuple[str, str]]) -> list[Problem]:
    """Puts messages of one kind together.

    Args:
        messages: (source, message without its source).

    Returns:
        The most frequent kind first; equally frequent ones in the order of the data.
    """
    problems: dict[str, Problem] = {}
    for source, message in messages:
        kind = kind_of(message)
        problems.setdefault(kind, Problem(kind)).records.append((source, message))
    # stable: kinds of one frequency stay in the order of the data
    return sorted(problems.values(), key=lambda problem: -problem.count)
