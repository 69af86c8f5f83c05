"""One line of a file of answers: the keys that it has, and whether a line that was kept is still such a line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# LLaVA's keys, in its order.  Source: haotian-liu/LLaVA llava/eval/model_vqa.py (commit c121f04)
KEYS: Mapping[str, type | tuple[type, ...]] = {
    "question_id": (str, int, float),
    "prompt": str,
    "text": str,
    "answer_id": str,
    "model_id": str,
    "metadata": dict,
}
_MORE = ("reference", "error")  # texts, where a line has them
ANY_QUESTION = object()


def read_line(text: bytes, question: Any = ANY_QUESTION) -> dict[str, Any] | None:
    """The answer that a line holds.

    Args:
        text: the line, with or without its end.
        question: the identity of the question whose line it is; `ANY_QUESTION` where that is not known.

    Returns:
        None for a line that is cut short, lacks a key or is of another question.
    """
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not all(isinstance(line.get(key), kind) for key, kind in KEYS.items()):
        return None
    if not all(isinstance(line.get(key, ""), str) for key in _MORE):
        return None
    # compared as JSON: in Python 1, 1.0 and True are equal
    is_asked = question is ANY_QUESTION or json.dumps(line["question_id"]) == json.dumps(question)
    return line if is_asked else None
