"""How the JSON of a record is decoded, and what its values are called in messages.  Knows no file and no form."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from paddlemix.errors import UserError


def refuse_constant(name: str) -> NoReturn:
    """For `json.JSONDecoder(parse_constant=...)`: NaN and the infinities, which JSON does not have.

    Raises:
        UserError: always.
    """
    raise UserError(f"{name} is not JSON; write a number or null")


# Python's decoder accepts NaN and Infinity, which JSON does not have and other programs refuse
DECODER = json.JSONDecoder(parse_constant=refuse_constant)


def undecodable(error: Exception) -> str:
    """Why `DECODER` gave no value, in words: NaN, a number of thousands of digits, or lists in lists without end."""
    return "lists or objects are nested too deeply" if isinstance(error, RecursionError) else str(error)


def json_kind(value: Any) -> str:
    """What JSON calls a value: "object", "array", "text", "boolean", "null" or "number"."""
    # bool before number: in Python it is a kind of int
    names = {dict: "object", list: "array", str: "text", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def not_an_object(value: Any) -> str:
    """The error about a record that is something else."""
    return f"a JSON {json_kind(value)}, expected an object with 'conversations'"
