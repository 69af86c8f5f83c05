"""One value against its key's declaration: type, range, choice.  Knows no file and no other key.

A fault is returned as text, so that the caller can gather all of them.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from paddlemix.config.keys import KeySpec
from paddlemix.config.sharing_rules import spelling_of
from paddlemix.errors import UserError, did_you_mean
from paddlemix.paths import user_path, user_place

_KIND_NAMES = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "list[str]": "a list of texts",
    "list": "a list",
    "dict": "an object",
    "None": "null",
}
# A float64 above it would become infinite on the device, without an error.
LARGEST_NUMBER = 3.4028234e38  # of float32, in which everything is computed
_BOOLEAN_TEXTS = {"true": True, "false": False}


def check_value(spec: KeySpec, value: object) -> tuple[Any, list[str]]:
    """A value in its key's own type, or what is wrong with it.

    Args:
        spec: the key.
        value: as read from JSON.  A whole number is accepted for a number too, and 0 and 1 for false and true.

    Returns:
        The converted value and []; or the key's default and one text per fault.
    """
    # The order matters:
    #   not finite     first, or NaN would be reported as a wrong type
    #   type           before the conversion, which relies on it
    #   path           no text that names a place has choices
    #   range, choice  of the converted value
    if isinstance(value, float) and not math.isfinite(value) and {"int", "float"} & set(spec.kinds):
        return spec.default, [f"{spec.name}: {_not_finite(value)}"]  # JSON has no infinity: 1e999 becomes one
    if not _fits(spec.kinds, value):
        return spec.default, [f"{spec.name}: expected {_wanted(spec)}, got {describe(value)}{_hint(spec, value)}"]
    converted = _convert(spec, value)
    # Paths have a rule of their own, shared with flags and with paths inside data files.
    if spec.path is not None and isinstance(converted, str) and converted:
        return _read_path(spec, converted)
    faults = _range_faults(spec, converted) + _choice_faults(spec, converted)
    return (spec.default, faults) if faults else (converted, [])


def _not_finite(value: float) -> str:
    if math.isnan(value):
        return "NaN is not a number; remove the key or give a number"
    return f"the number is beyond {LARGEST_NUMBER:g}, the largest that float32 has"


def _read_path(spec: KeySpec, text: str) -> tuple[Any, list[str]]:
    try:
        if spec.path == "local":
            user_path(text, spec.name)
        return user_place(text, spec.name), []  # as text: "./name" is not a model's name
    except UserError as error:
        return spec.default, [str(error)]


def parse_text(spec: KeySpec, text: str) -> object:
    """The value that a text on the command line means.

    Args:
        spec: the key; a key for text takes `2024` or `true` as text.
        text: JSON, or plain text; True, False and None as Python writes them are understood too.

    Returns:
        The value, not yet checked.
    """
    try:
        # JSON first, then what Python and shells write: True, None, .5
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _parse_plain(spec, text)
    # `run_name=2024` is text although JSON reads a number there.
    return text if "str" in spec.kinds and not _fits(spec.kinds, value) else value


def parse_any(text: str) -> object:
    """What a text on the command line means if no key says what is wanted: JSON, True, False, else the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _BOOLEAN_TEXTS.get(text.lower(), text)


def describe(value: object) -> str:
    """A value in words, for messages: "text '2e-4'", "the number 3", "a list"."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return f"text '{value}'"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    return "a list" if isinstance(value, list) else "an object"


def _parse_plain(spec: KeySpec, text: str) -> object:
    if "bool" in spec.kinds and text.lower() in _BOOLEAN_TEXTS:
        return _BOOLEAN_TEXTS[text.lower()]
    if "None" in spec.kinds and text == "None":
        return None
    if "float" in spec.kinds and _is_number(text):  # .5 and 1. are numbers, though not in JSON
        return float(text)
    return text


def _fits(kinds: tuple[str, ...], value: object) -> bool:
    """Whether a value is of one of the kinds, or is accepted for one."""
    if value is None:
        return "None" in kinds
    # before int: True is an int in Python, and lora_rank true must not be 1
    if isinstance(value, bool):
        return "bool" in kinds
    if isinstance(value, int):
        # Python's whole numbers are unlimited, paddle's are not.
        fits = -(2**63) <= value < 2**63
        return fits and ("int" in kinds or "float" in kinds or ("bool" in kinds and value in (0, 1)))
    if isinstance(value, float):
        return "float" in kinds and math.isfinite(value)
    if isinstance(value, list):
        return "list" in kinds or ("list[str]" in kinds and all(isinstance(item, str) for item in value))
    return ("str" if isinstance(value, str) else "dict") in kinds


def _convert(spec: KeySpec, value: Any) -> Any:
    # 0 and 1 for a key that is a switch, whole numbers for one that is a number
    if isinstance(value, int) and "int" not in spec.kinds:
        return bool(value) if "bool" in spec.kinds else float(value)
    return value


def _wanted(spec: KeySpec) -> str:
    return " or ".join(_KIND_NAMES[kind] for kind in spec.kinds)


def _hint(spec: KeySpec, value: object) -> str:
    """What to do about a value of the wrong type, or ""."""
    numeric = "int" in spec.kinds or "float" in spec.kinds
    if isinstance(value, str):
        # "2e-4" is text in JSON; the quotes are the usual slip
        if (numeric and _is_number(value)) or ("bool" in spec.kinds and value.lower() in _BOOLEAN_TEXTS):
            return "; remove the quotes"
        return f"; write {json.dumps([value], ensure_ascii=False)}" if "list[str]" in spec.kinds else ""
    # 1e3 is a float in JSON even though it is whole
    if isinstance(value, float) and "int" in spec.kinds and value.is_integer():
        return f"; write {int(value)}"
    return "; put it in quotes" if "str" in spec.kinds and isinstance(value, (int, float)) else ""


# Distinguishes '2e-4' in quotes, where the quotes are the mistake, from other text.
def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _range_faults(spec: KeySpec, value: object) -> list[str]:
    # a bool passes, but no switch has bounds
    if not isinstance(value, (int, float)):
        return []
    if abs(value) > LARGEST_NUMBER:
        return [f"{spec.name}: {value:g} is beyond {LARGEST_NUMBER:g}, the largest number that float32 has"]
    unit = f" {spec.unit}" if spec.unit else ""
    if spec.min is not None and value < spec.min:
        return [f"{spec.name}: {value}{unit} is below {spec.min}, the minimum"]
    if spec.max is not None and value > spec.max:
        return [f"{spec.name}: {value}{unit} is above {spec.max}, the maximum"]
    return []


def _choice_faults(spec: KeySpec, value: object) -> list[str]:
    """Faults of texts that are not among the choices, each with the nearest choice."""
    if not spec.choices:
        return []
    texts = value if isinstance(value, list) else [value]
    allowed = ", ".join(choice or '""' for choice in spec.choices)
    return [
        f"{spec.name}='{text}' is not one of {allowed}{_meant(spec, text)}"
        for text in texts
        if isinstance(text, str) and not _is_choice(spec, text)
    ]


def _meant(spec: KeySpec, text: str) -> str:
    known = spelling_of(text) if spec.name == "sharding" else None
    return did_you_mean(text, spec.choices) if known is None else f"; did you mean '{known}'?"


def _is_choice(spec: KeySpec, text: str) -> bool:
    # with a pattern `choices` are examples for the message, not the whole list
    return re.fullmatch(spec.pattern, text) is not None if spec.pattern else text in spec.choices
