"""The errors a user can cause, the end that a user can ask for, and nothing else.

A command catches `UserError`, prints its one message and ends with status 2; every other exception is a defect of ours
and keeps its traceback.  Library callers catch the same classes as `ValueError` and `FileNotFoundError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: the message names the value, what is allowed and what to do."""


class MissingFileError(UserError, FileNotFoundError):
    """A path that was named does not exist or cannot be read."""


class Stopped(SystemExit):
    """A run that ended in order because of a signal; the process's status is that of a shell, 128 + the signal.

    Args:
        number: the signal, e.g. `signal.SIGTERM`.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Suggestion to append to an error about an unknown name.

    Args:
        name: what was given.
        allowed: the names that exist.

    Returns:
        "; did you mean 'x'?" for the nearest allowed name, or "" when none is near.
    """
    nearest = difflib.get_close_matches(name, list(allowed), n=1)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""
