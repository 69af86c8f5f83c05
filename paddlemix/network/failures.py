"""What goes wrong between machines: errors that may pass, errors that will not, and both in words."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

from paddlemix.errors import UserError, without_secrets

PASSING_STATUSES = (408, 425, 429, 500, 502, 503, 504)


class PassingError(Exception):
    """An attempt failed in a way that may pass; `wait` is what the server asks for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class UnreachableError(UserError):
    """Something cannot be had from a server; the message is the reason alone."""


def may_pass(status: int) -> bool:
    """Whether another attempt may get a better answer than this status."""
    return status in PASSING_STATUSES or status >= 500


def retry_after(value: str) -> float | None:
    """Seconds of a Retry-After header, which are a number or a date; None where it says neither."""
    if re.fullmatch(r"\s*\d{1,9}\s*", value):
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except (ValueError, TypeError, OverflowError):  # the last one of a year that no calendar has
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return max((moment - datetime.now(timezone.utc)).total_seconds(), 0.0)


def plain_cause(error: BaseException) -> str:
    """The innermost cause of a network error in words: the outer ones quote the objects of their libraries."""
    cause: Any = error
    # requests wraps urllib3, which wraps the system's error: only the last one says what happened
    while (inner := _inner(cause)) is not None:
        cause = inner
    # "<urllib3.connection.HTTPSConnection object at 0x7f...>: " says nothing to a user
    text = re.sub(r"^.*(?:object at 0x\w+>|\)): ", "", str(cause.args[-1] if cause.args else ""))
    shown = "".join(character if character.isprintable() else "?" for character in without_secrets(text.strip()))
    return f"{type(cause).__name__}: {shown}" if shown else type(cause).__name__


def _inner(error: Any) -> Exception | None:
    """The error that another one wraps: its reason, else the last of its arguments that is one."""
    wrapped = (getattr(error, "reason", None), *reversed(error.args))
    return next((item for item in wrapped if isinstance(item, Exception)), None)
