"""Network errors in words."""

from __future__ import annotations

import re
from typing import Any


def plain_cause(error: BaseException) -> str:
    """The innermost cause of a network error in words: the outer ones quote the objects of their libraries."""
    cause: Any = error
    while isinstance(inner := getattr(cause, "reason", None) or (cause.args or [None])[-1], Exception):
        cause = inner
    text = re.sub(r"^.*(?:object at 0x\w+>|\)): ", "", str(cause.args[-1] if cause.args else ""))
    shown = "".join(character if character.isprintable() else "?" for character in text.strip())
    return f"{type(cause).__name__}: {shown}" if shown else type(cause).__name__
