"""One reader of the JSON files that declare what a model, a processor or an adapter is.

    values = read_object(path)                        # a JSON object: limited in size and depth, no key twice
    known = take(values, KEYS, str(path))             # its values, checked; null counts as absent

Every key of such a file is in one of three tables of its `Keys`: read (with a rule for its value), refused (it changes
what is computed, and only the values that change nothing are allowed) or harmless.  Any other key is named in a warning
once.  Knows no key by name.
"""

from __future__ import annotations

import json
import logging
import math
import os
import select
import stat
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from paddlemix.errors import MissingFileError, UserError
from paddlemix.lfs import refuse_pointer_content

MAX_BYTES = 64 * 1024**2  # of a file; the index of a model with a million tensors has less
MAX_DEPTH = 64  # objects and lists inside each other
_PIPE_SECONDS = 10.0  # that a pipe may be silent
_SHOWN = 60  # characters of a value in an error
_told: set[tuple[str, tuple[str, ...]]] = set()


class _Repeated(ValueError):
    """A key that an object has twice, with different values."""


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """The text of a file, UTF-8 with or without a byte order mark.

    Args:
        limit: most bytes.

    Raises:
        MissingFileError: there is no such file, or it cannot be read.
        UserError: it is longer than `limit`, is not UTF-8, or is a pipe into which nobody writes.
    """
    try:
        # a pipe without a writer would block for ever
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            content = _read_limited(descriptor, limit, path)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise MissingFileError(f"'{path}' does not exist") from None
    except IsADirectoryError:
        raise UserError(f"'{path}' is a folder, expected a file") from None
    except OSError as error:
        raise MissingFileError(f"'{path}' cannot be read: {error.strerror}") from None
    refuse_pointer_content(content, f"'{path}'")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _read_limited(descriptor: int, limit: int, path: Path) -> bytes:
    mode = os.fstat(descriptor).st_mode
    waits = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
    pieces: list[bytes] = []
    size = 0
    while size <= limit:
        if waits and not select.select([descriptor], [], [], _PIPE_SECONDS)[0]:
            raise UserError(f"'{path}' is a pipe into which nothing was written for {_PIPE_SECONDS:.0f} s")
        piece = os.read(descriptor, min(1 << 20, limit + 1 - size))
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)
        size += len(piece)
    raise UserError(f"'{path}' is longer than {limit:,} bytes, the limit for such a file; is it the right file?")


def parse_json(text: str, repeats: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        repeats: a key may be there twice with different values, and the last one counts.

    Raises:
        json.JSONDecodeError: it is not JSON.
        UserError: an object has a key twice with different values, it is deeper than `MAX_DEPTH`, or a number has
            thousands of digits.
    """
    try:
        value = json.loads(text, object_pairs_hook=None if repeats else _without_repeats)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise UserError(f"objects and lists are nested deeper than {MAX_DEPTH}") from None
    except _Repeated as error:
        raise UserError(f"the key '{error}' is there twice with different values; remove one") from None
    except ValueError as error:
        raise UserError(f"not JSON: {error}") from None
    _check_depth(value)
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        for key, value in pairs:
            if values[key] != value:
                raise _Repeated(key)
    return values


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for item in level:
            children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
            inner += [child for child in children if isinstance(child, dict | list)]
        if not inner:
            return
        level = inner
    raise UserError(f"objects and lists are nested deeper than {MAX_DEPTH}")


def read_object(path: Path, limit: int = MAX_BYTES) -> dict[str, Any]:
    """A file's JSON object as it is, null included: to be changed and written again, or for `take`.

    Raises:
        MissingFileError: there is no such file, or it cannot be read.
        UserError: it is no JSON object, or is beyond what `read_text` and `parse_json` allow.
    """
    text = read_text(path, limit)
    try:
        values = parse_json(text)
    except json.JSONDecodeError as error:
        raise UserError(f"'{path}' is not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except UserError as error:
        raise UserError(f"'{path}': {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"'{path}' holds no JSON object but {describe(values)}")
    return values


def without_null(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that have a value: in a declared file, null is the same as no key."""
    return {key: value for key, value in values.items() if value is not None}


def describe(value: Any) -> str:
    """A JSON value in an error: cut short, and its kind where that could be missed ("40" is a text)."""
    try:
        shown = json.dumps(value, ensure_ascii=True, default=repr)
    except (ValueError, RecursionError):
        shown = "a value"
    shown = shown if len(shown) <= _SHOWN else shown[:_SHOWN] + " ..."
    kinds = ((str, " (text)"), (list, " (a list)"), (dict, " (an object)"))
    return shown + next((kind for item, kind in kinds if isinstance(value, item)), "")


@dataclass(frozen=True)
class Rule:
    """What a value may be.

    Args:
        expected: for errors, "a whole number from 1 to 1000".
        read: returns the value as it is used; raises ValueError, TypeError or OverflowError where it is not allowed.
            A UserError keeps its own words.
    """

    expected: str
    read: Callable[[Any], Any]


def _refuse() -> NoReturn:
    raise ValueError


def integer(low: int, high: int) -> Rule:
    """A whole number in a range; 4096.0 is one, "4096" and true are not."""

    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
            _refuse()
        return int(value) if low <= value <= high else _refuse()

    return Rule(f"a whole number from {low:,} to {high:,}", read)


def number(low: float, high: float) -> Rule:
    """A finite number in a range."""

    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            _refuse()
        return value if low <= value <= high else _refuse()

    return Rule(f"a number from {low:g} to {high:g}", read)


def _read_flag(value: Any) -> bool:
    return value if isinstance(value, bool) else _refuse()


def _read_text_value(value: Any) -> str:
    if not isinstance(value, str):
        _refuse()
    value.encode()  # half a surrogate raises UnicodeEncodeError, a ValueError
    return value


def _read_object_value(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else _refuse()


flag = Rule("true or false", _read_flag)
text = Rule("a text", _read_text_value)
mapping = Rule("an object", _read_object_value)
anything = Rule("any value", lambda value: value)


def choice(*allowed: Any, because: str = "") -> Rule:
    """One of some values, told apart by type too: 1 is not true.

    Args:
        because: why no other is allowed, for the error.
    """

    def read(value: Any) -> Any:
        same = [item for item in allowed if item == value and isinstance(item, bool) == isinstance(value, bool)]
        return same[0] if same else _refuse()

    shown = ", ".join(json.dumps(item) for item in allowed) or "null"
    return Rule(f"{shown}{' (' + because + ')' if because else ''}", read)


def items(rule: Rule, low: int = 0, high: int = 1_000_000) -> Rule:
    """A list whose every item keeps a rule.

    Args:
        low, high: how many items.
    """

    def read(value: Any) -> list[Any]:
        if not isinstance(value, list | tuple) or not low <= len(value) <= high:
            _refuse()
        return [rule.read(item) for item in value]

    count = f"{low}" if low == high else f"{low:,} or more" if high == 1_000_000 else f"{low:,} to {high:,}"
    return Rule(f"a list of {count}, each {rule.expected}", read)


def mapping_of(rule: Rule) -> Rule:
    """An object whose every value keeps a rule."""

    def read(value: Any) -> dict[str, Any]:
        return {key: rule.read(item) for key, item in mapping.read(value).items()}

    return Rule(f"an object, each value {rule.expected}", read)


def either(*rules: Rule) -> Rule:
    """The first rule that a value keeps."""

    def read(value: Any) -> Any:
        for rule in rules:
            try:
                return rule.read(value)
            except UserError:
                raise
            except (ValueError, TypeError, OverflowError):
                continue
        return _refuse()

    return Rule(", or ".join(rule.expected for rule in rules), read)


def key_names(text: str) -> frozenset[str]:
    """Keys that are written one behind the other, with spaces between."""
    return frozenset(text.split())


@dataclass(frozen=True)
class Keys:
    """The keys of one kind of declared file.

    Args:
        read: those whose values are used.
        refused: those that change what is computed in a way that is not supported, with a rule for values that change
            nothing.
        harmless: those that change nothing that is computed, as the program uses the file.
        nullable: keys of `read` whose null means something else than no key, and is then returned as None.
    """

    read: Mapping[str, Rule]
    refused: Mapping[str, Rule] = field(default_factory=dict)
    harmless: Collection[str] = frozenset()
    nullable: Collection[str] = frozenset()


def take(values: Any, keys: Keys, where: str = "", tell: bool = True) -> dict[str, Any]:
    """The values of a declared object that are used.

    Args:
        values: the object.
        keys: what it may hold.
        where: for errors and warnings, "config.json" or "config.json: text_config".
        tell: whether to name unknown keys in a warning.

    Returns:
        key -> value, for the keys of `keys.read` that have one; null is absent.

    Raises:
        UserError: it is no object, or lists every value that is not allowed.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where} is {describe(values)}, expected an object")
    found: dict[str, Any] = {}
    faults, unknown = [], []
    for key, value in values.items():
        if value is None:
            found |= {key: None} if key in keys.nullable else {}
            continue
        rule = keys.read.get(key) or keys.refused.get(key)
        if rule is None:
            unknown += [key] if key not in keys.harmless else []
            continue
        try:
            found[key] = rule.read(value)
        except UserError as error:
            faults.append(f"{key}: {error}")
        except (ValueError, TypeError, OverflowError):
            supported = "allowed" if key in keys.read else "supported"
            faults.append(f"{key} is {describe(value)}; {supported}: {rule.expected}")
    if faults:
        raise UserError((f"{where}: " if where else "") + "; ".join(faults))
    if tell:
        tell_unknown(where, unknown)
    return {key: value for key, value in found.items() if key in keys.read}


def tell_unknown(where: str, keys: Collection[str]) -> None:
    """Names keys that nobody reads in a warning, once for each file in a process."""
    mark = (where, tuple(sorted(map(str, keys))))
    if keys and mark not in _told:
        _told.add(mark)
        listed = ", ".join(describe(key).removesuffix(" (text)") for key in mark[1][:12])
        more = f" and {len(mark[1]) - 12} more" if len(mark[1]) > 12 else ""
        logging.getLogger("paddlemix").warning(
            "%s: unknown keys are not used: %s%s; if they change what the model computes, its numbers will differ",
            where,
            listed,
            more,
        )
