"""Damages JSON values, pickles and plain bytes, each from a random generator, so that a number repeats any of it."""

from __future__ import annotations

import copy
import json
import pickletools
import random
import struct
from typing import Any

ABSURD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, -2, 7, 1e9, 10**9, 10**12, 2**31, 2**63, 2**64, -(2**63), 10**400),
    *(0.5, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", "a", "0", "-2", "40", "1e9", "../..", "/etc/passwd", "\0", "\ud800", "é你😀", "a" * 300, "a" * 100_000),
    *([], {}, [[]], [None], [-2], [1, 2], [1, 2, 3], {"a": {}}, [{}], "<image>", "float16", "auto", "none"),
)
_REPEATED = 100_000  # characters that a repeated value grows to: three times fifty of a vocabulary would be all memory


class Repeated(dict):  # type: ignore[type-arg]
    """A JSON object that says one of its keys twice."""


def mutate_json(draw: random.Random, value: Any, times: int | None = None) -> Any:
    """A value with a few places changed: replaced, removed, repeated, nested, exchanged with another."""
    value = json.loads(json.dumps(value))
    for _ in range(times or draw.choice((1, 1, 1, 2, 3))):
        value = _mutate_once(draw, value)
    return value


def _mutate_once(draw: random.Random, root: Any) -> Any:
    places = _places(root)
    if not places or draw.random() < 0.03:
        return _absurd(draw)
    holder, key = draw.choice(places)
    kind = draw.choice(("absurd", "absurd", "type", "nearby", "remove", "nest", "other", "twin", "rename"))
    old = holder[key]
    if kind == "absurd":
        holder[key] = _absurd(draw)
    elif kind == "type":
        holder[key] = _other_type(draw, old)
    elif kind == "nearby" and isinstance(old, int | float) and not isinstance(old, bool):
        holder[key] = draw.choice((old + 1, old - 1, -old, old * 2, old * 1000, old + 0.5 if abs(old) < 1e300 else 0))
    elif kind == "remove":
        del holder[key]
    elif kind == "nest":
        holder[key] = _nested(draw, old)
    elif kind == "other":
        other, at = draw.choice(places)
        holder[key] = json.loads(json.dumps(other[at]))
    elif kind == "twin" and isinstance(holder, list):
        holder.insert(key, json.loads(json.dumps(old)))  # a copy: put into the other later, it would hold itself
    elif kind == "rename" and isinstance(holder, dict):
        holder[draw.choice((f"{key}x", "", "\ud800", "a" * 500, key.upper()))] = holder.pop(key)
    else:
        holder[key] = _absurd(draw)
    return root


def _absurd(draw: random.Random) -> Any:
    """One of `ABSURD`, a copy: a later change inside it would otherwise change every later case."""
    return copy.deepcopy(draw.choice(ABSURD))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (object or list, key or index) inside a value."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        item = waiting.pop()
        keys = list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        for key in keys:
            found.append((item, key))
            waiting.append(item[key])
    return found


def _other_type(draw: random.Random, value: Any) -> Any:
    ways = (
        *(lambda: str(value), lambda: [value], lambda: {"value": value}, lambda: bool(value)),
        lambda: [value] * max(2, min(50, _REPEATED // len(json.dumps(value)))),
    )
    return draw.choice(ways)()


def _nested(draw: random.Random, value: Any) -> Any:
    for _ in range(draw.choice((1, 2, 70, 150))):
        value = [value] if draw.random() < 0.5 else {"a": value}
    return value


def encode_json(draw: random.Random, value: Any) -> bytes:
    """A value as a file; rarely damaged as a text, too."""
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5)
    way = draw.random()
    if way < 0.03:
        text = "[" * 100_000 + text
    elif way < 0.06:
        text = text.replace("{", '{"dtype": 3, "architectures": 7,', 1)
    elif way < 0.08:
        text = "\ufeff" + text
    content = text.encode("utf-8", "surrogatepass")
    return mutate_bytes(draw, content) if 0.08 <= way < 0.2 else content


def mutate_bytes(draw: random.Random, content: bytes) -> bytes:
    """Content with bits flipped, a piece removed, repeated, overwritten, or its end lost."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        if not data:
            return bytes(data)
        at, kind = draw.randrange(len(data)), draw.randrange(7)
        count = draw.choice((1, 1, 2, 4, 8, 64))
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        elif kind == 2:
            del data[at : at + count]
        elif kind == 3:
            data[at:at] = data[at : at + count] * draw.choice((1, 2, 100))
        elif kind == 4:
            data[at : at + 4] = struct.pack(draw.choice("<>") + "I", draw.choice((0, 1, 2**31, 2**32 - 1, 65535)))
        elif kind == 5:
            data[at:at] = draw.randbytes(count)
        else:
            del data[at if draw.random() < 0.3 else max(len(data) - count, 0) :]
    return bytes(data)


# What a pickle may be made to do more of: marks, memo, containers, calls, numbers without end.
_OPCODES = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]
_PIECES = (
    b")q\x000",
    b"h\x00h\x00\x86q\x000",
    b"\x85" * 5000,
    b"(" * 5000,
    b"}",
    b"]",
    b"K\x05",
    b"X\x01\x00\x00\x00a",
)


def mutate_pickle(draw: random.Random, code: bytes) -> bytes:
    """A pickle with instructions removed, repeated, exchanged or put in, or damaged as bytes."""
    if draw.random() < 0.3:
        return mutate_bytes(draw, code)
    try:
        starts = [place for _, _, place in pickletools.genops(code) if place is not None]
    except (ValueError, UnicodeError):
        return mutate_bytes(draw, code)
    ends = [*starts[1:], len(code)]
    steps = [code[start:end] for start, end in zip(starts, ends, strict=True)]
    for _ in range(draw.choice((1, 1, 2, 3))):
        at, other = draw.randrange(len(steps)), draw.randrange(len(steps))
        kind = draw.randrange(6)
        if kind == 0:
            steps[at] = b""
        elif kind == 1:
            steps.insert(at, steps[other])
        elif kind == 2:
            steps[at], steps[other] = steps[other], steps[at]
        elif kind == 3:
            steps.insert(at, draw.choice(_OPCODES))
        elif kind == 4:
            steps.insert(at, draw.choice(_PIECES) * draw.choice((1, 1, 60)))
        else:
            steps[at] = mutate_bytes(draw, steps[at])
    return b"".join(steps)
