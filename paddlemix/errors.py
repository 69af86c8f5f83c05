"""The errors that a user can cause, and the end that a user can ask for.

A command catches `UserError`, prints its one message and ends with status 2; every other exception is a defect of ours
and keeps its traceback.  Library callers catch the same classes as `ValueError` and `FileNotFoundError`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_USER = re.compile(r"(?<=://)[^/?#\s]*@")
# Parameters whose names say that they are secret: AWS and Azure signatures, api_key=, access_token=, sig=.  A parameter
# that merely contains "key", such as keyword=, is not one.
_SECRET = re.compile(
    r"(?i)([?&;](?:[\w.\-]*(?:token|secret|signature|passw|credential|accesskey|session)[\w.\-]*"
    r"|(?:[\w.]*[_\-])?(?:api-?key|key|sig|sign|sas|pwd|pass|auth\w*))=)[^&;#\s'\"]+"
)
_LONG_WORD = 1000  # characters without a space: not a path or a name, but e.g. a picture in base64
_SHOWN_OF_IT = 100
_CLOSENESS = 0.75  # share of common letters: 'sede' is near 'seed', 'deepspeed' is not
_CLOSE_WORD = 0.9  # the same of one word of a name: 'acuracy' is near 'token_accuracy'


class UserError(ValueError):
    """Bad input: the message names the value, what is allowed and what to do.

    Whatever a message quotes, it repeats no secret of an address, only the beginning of a word of 1,000 characters, and
    half a surrogate, which is not text, as an escape.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(fit_to_show(item) if isinstance(item, str) else item for item in arguments))


class MissingFileError(UserError, FileNotFoundError):
    """A path that was named does not exist or cannot be read."""


class OtherProcessError(UserError):
    """Another process of the run has failed and reports why; this one only ends with it."""


class Stopped(SystemExit):
    """A run that ended cleanly because of a signal; the process's status is as in a shell, 128 + the signal.

    Args:
        number: the signal, e.g. `signal.SIGTERM`.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


def without_secrets(text: str) -> str:
    """An address, or a text that quotes some, as messages and logs may repeat it.

        without_secrets("https://me:pass@host/a.png?token=abc&size=2")  # "https://***@host/a.png?token=***&size=2"

    Returns:
        The text with "***" in place of every user and password, and of the values of parameters named like a token,
        a key or a signature.
    """
    return _SECRET.sub(r"\1***", _USER.sub("***@", text))


def cut(text: str, limit: int) -> str:
    """A value as a message repeats it: whole, or its first `limit` characters and how many there are."""
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


def fit_to_show(message: str) -> str:
    """A message without secrets, endless words and what is not text."""
    # Half a surrogate becomes its escape: a log with one in it could not be written.
    message = message.encode("utf-8", "backslashreplace").decode()
    if len(message) <= _LONG_WORD:
        return without_secrets(message)
    # A word without end is data, a picture in base64 for example.
    return without_secrets(re.sub(rf"\S{{{_LONG_WORD},}}", lambda word: cut(word[0], _SHOWN_OF_IT), message))


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Suggestion to append to an error about an unknown name.

    Args:
        name: what was given.
        allowed: the names that exist.

    Returns:
        "; did you mean 'x'?" for the nearest allowed name, or "" when none is near.
    """
    names = list(allowed)
    # Long names need more in common than short ones, which have fewer letters to share.
    closeness = _CLOSENESS if len(name) != 3 else 0.66  # one wrong letter of three is near too: 'nf5'
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=closeness)
    # No whole name is near: compare single words, since users leave a prefix out ("accuracy" for "token_accuracy").
    # The first name with a word wins, hence reversed.
    if not nearest:
        # No near name: perhaps one of its words, as in 'acuracy'.
        words = {word: one for one in reversed(names) for word in one.split("_")}
        nearest = [words[word] for word in difflib.get_close_matches(name, words, n=1, cutoff=_CLOSE_WORD)]
    return f"; did you mean '{nearest[0]}'?" if nearest else ""
