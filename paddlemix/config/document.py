"""A JSON file as an object that remembers the line of every key, so that an error can name it.

Knows no key by name.  The text is parsed by the standard library; the locator only walks over text that it accepted.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paddlemix.config.foreign.names import foreign_file
from paddlemix.errors import MissingFileError, UserError, cut, did_you_mean
from paddlemix.json_files import parse_json, read_text

_SHOWN = 300  # characters of a line in an error
# Enough to walk over JSON that is known to be valid: strings and brackets; numbers and words are skipped.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],]')


@dataclass(frozen=True, kw_only=True)
class Document:
    """One JSON object and the lines of its keys.

    Args:
        values: the object.
        lines: path of a key -> its line, from 1; "dataset.train[0].name" for inner keys.
        repeated: (path, its line, the line of the first) of keys that are repeated.
    """

    values: dict[str, Any]
    lines: dict[str, int]
    repeated: tuple[tuple[str, int, int], ...] = ()


def read_document(path: Path) -> Document:
    """Read a file that holds one JSON object.

    Args:
        path: the file, UTF-8, with or without a byte order mark.

    Raises:
        MissingFileError: there is no such file, or it cannot be read.
        UserError: it is not UTF-8, not JSON (names line, column and the line itself), not an object, too long or
            nested too deep.
    """
    text = _read_text(path)
    try:
        # with `repeats`: a repeated key is reported later, with both lines and together with all other faults
        values = parse_json(text, repeats=True)
    except json.JSONDecodeError as error:
        raise UserError(_explain_syntax(path, text, error)) from None
    except UserError as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f'{path}: the file must hold one object of keys, {{"model_name_or_path": ...}}')
    lines: dict[str, int] = {}
    repeated = []
    for key_path, line in locate_keys(text):
        # The first line is reported as the original, later ones as repetitions.
        if key_path in lines:
            repeated.append((key_path, line, lines[key_path]))
        else:
            lines[key_path] = line
    return Document(values=values, lines=lines, repeated=tuple(repeated))


@dataclass
class _Level:
    """An object or list that is open while the text is walked over.

    Args:
        path: its own.
        is_object: False for a list.
        index: items passed, of a list.
        name: the key whose value comes next; None while a key is expected.
    """

    path: str
    is_object: bool
    index: int = 0
    name: str | None = None

    def value_path(self) -> str:
        """Path of the value that comes next."""
        if not self.is_object:
            return f"{self.path}[{self.index}]"
        return f"{self.path}.{self.name}" if self.path else str(self.name)


def locate_keys(text: str) -> list[tuple[str, int]]:
    """Every key of a JSON text, in reading order.

    Args:
        text: valid JSON.

    Returns:
        (path, line from 1), e.g. [("dataset", 2), ("dataset.train", 3), ("dataset.train[0].name", 4)].
    """
    found: list[tuple[str, int]] = []
    levels: list[_Level] = []
    line, position = 1, 0
    for token in _TOKEN.finditer(text):
        # counted from token to token, not from the start: linear in the length of the file
        line, position = line + text.count("\n", position, token.start()), token.start()
        mark = token.group()
        if mark in "{[":
            levels.append(_Level(path=levels[-1].value_path() if levels else "", is_object=mark == "{"))
        elif mark in "}]":
            levels.pop()
        elif mark == ",":
            levels[-1].index += 1
            levels[-1].name = None
        elif levels and levels[-1].is_object and levels[-1].name is None:
            # A string where a key is expected; decoded, since keys may be escaped.
            levels[-1].name = json.loads(mark)
            found.append((levels[-1].value_path(), line))
    return found


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the JSON file inside it")
    try:
        return read_text(path)
    except MissingFileError as error:
        # unreadable, not missing: similar names in the folder would mislead
        if path.exists():
            raise MissingFileError(f"configuration file {error}") from None
        # A wrong name is most often a spelling of a file beside it.
        siblings = [item.name for item in path.parent.glob("*.json")] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, siblings) or foreign_file(path, "; ")
        raise MissingFileError(f"configuration file {path} does not exist{hint}") from None


def _explain_syntax(path: Path, text: str, error: json.JSONDecodeError) -> str:
    """The message for text that is not JSON, with the line and, for the usual slips, what to do."""
    if not text.strip():
        return f'{path} is empty; it must hold one object of keys, {{"model_name_or_path": ...}}'
    lines = text.splitlines() or [""]
    shown = lines[min(error.lineno, len(lines)) - 1].strip()
    here = text[error.pos : error.pos + 1]
    hint = ""
    # first: a YAML or Python file fails at some character that the other hints would misread
    if foreign_file(path):
        hint = foreign_file(path, "; ")
    elif here in ("/", "#"):
        hint = "; JSON has no comments, remove it"
    # Python 3.13 names the trailing comma and points at it, earlier versions at the bracket after it
    elif text[: error.pos].rstrip().endswith(",") or "trailing comma" in error.msg:
        hint = "; remove the comma before the closing bracket"
    # the parser stops at the next key, below the line whose comma is missing
    elif error.msg.startswith("Expecting ',' delimiter") and shown.startswith('"') and error.lineno > 1:
        hint = "; is the comma missing at the end of the line before?"
    return (
        f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}){hint}: {cut(shown, _SHOWN)}"
    )
