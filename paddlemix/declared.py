"""The keys and values of JSON files that declare what a model, a processor or an adapter is.

    values = read_object(path)                        # of `json_files.py`
    known = take(values, KEYS, str(path))             # its values, checked; null counts as absent

Every key of such a file is in one of three tables of its `Keys`: read (with a rule for its value), refused (it changes
what is computed, and only values that change nothing are allowed) or harmless.  Any other key is named in a warning
once.  Knows no key by name.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from paddlemix.errors import UserError
from paddlemix.json_files import describe

_warned: set[tuple[str, tuple[str, ...]]] = set()


def without_null(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that have a value: in a declared file, null means the same as no key."""
    return {key: value for key, value in values.items() if value is not None}


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
        # In Python true is an int, 1.  Infinity and NaN raise in `int`, as OverflowError and ValueError: both are "not
        # allowed".
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
    """One of some values, distinguished by type too: 1 is not true.

    Args:
        because: why no other is allowed, for the error.
    """

    def read(value: Any) -> Any:
        # Equality alone would accept true where 1 is allowed, and 0 where false is.
        same = [item for item in allowed if item == value and isinstance(item, bool) == isinstance(value, bool)]
        return same[0] if same else _refuse()

    shown = ", ".join(json.dumps(item) for item in allowed) or "null"
    return Rule(f"{shown}{' (' + because + ')' if because else ''}", read)


def items(rule: Rule, low: int = 0, high: int = 1_000_000) -> Rule:
    """A list whose items all follow a rule.

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
    """An object whose values all follow a rule."""

    def read(value: Any) -> dict[str, Any]:
        return {key: rule.read(item) for key, item in mapping.read(value).items()}

    return Rule(f"an object, each value {rule.expected}", read)


def either(*rules: Rule) -> Rule:
    """The first rule that a value follows."""

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
    """Keys written one after the other, separated by spaces."""
    return frozenset(text.split())


@dataclass(frozen=True)
class Keys:
    """The keys of one kind of declared file.

    Args:
        read: those whose values are used.
        refused: those that change what is computed in a way that is not supported, with a rule for values that change
            nothing.
        harmless: those that change nothing that is computed, as the program uses the file.
        nullable: keys of `read` whose null does not mean the same as no key; it is returned as None.
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
        tell: whether to warn of unknown keys.

    Returns:
        key -> value, for the keys of `keys.read` that have one; null is absent.

    Raises:
        UserError: it is not an object; or values are not allowed, all of which are listed.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where} is {describe(values)}, expected an object")
    found: dict[str, Any] = {}
    faults, unknown = [], []
    for key, value in values.items():
        # transformers writes null for "not set"; it counts as absent unless the key gives null a meaning of its own.
        if value is None:
            found |= {key: None} if key in keys.nullable else {}
            continue
        # Refused keys are checked like read ones but not returned: a value that changes nothing passes, any other is an
        # error.
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
    """Warns of keys that nobody reads, once per file and process."""
    mark = (where, tuple(sorted(map(str, keys))))
    if keys and mark not in _warned:
        _warned.add(mark)
        listed = ", ".join(describe(key).removesuffix(" (text)") for key in mark[1][:12])
        more = f" and {len(mark[1]) - 12} more" if len(mark[1]) > 12 else ""
        logging.getLogger("paddlemix").warning(
            "%s: unknown keys are not used: %s%s; if they change what the model computes, its numbers will differ",
            where,
            listed,
            more,
        )
