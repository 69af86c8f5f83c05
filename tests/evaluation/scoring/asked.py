"""Questions with answers, as the tests of scorers write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paddlemix.evaluation.scoring.answered import Answered


def ask(texts: Sequence[str | None], records: Sequence[dict[str, Any]], **same: Any) -> list[Answered]:
    """A question for each text; a record's "id", "category", "prompt" and "image" are the question's own."""
    found = []
    for number, (text, record) in enumerate(zip(texts, records, strict=True)):
        own = {key: record[key] for key in ("category", "prompt", "image") if key in record}
        found.append(Answered(question_id=record.get("id", number), text=text, record=record, **{**same, **own}))
    return found
