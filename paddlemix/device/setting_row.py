"""What a row of the table of settings is: a variable that paddle, its plugins or our kernels read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DEVICE_KINDS = ("gpu", "npu", "xpu", "cpu")

# How a value is read decides how it can be wrong; checks.py has a check for each.
Form = Literal[
    "text", "count", "flag", "switch", "first letter", "cards", "names", "strategy", "folder", "call", "duration"
]
When = Literal["before paddle is imported", "before the first operator"]

BEFORE_IMPORT: When = "before paddle is imported"
BEFORE_USE: When = "before the first operator"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row.

    Args:
        name: of the environment variable; of a call for `form` "call".
        kinds: devices that it concerns, of `DEVICE_KINDS`.
        value: what is set if the user exported nothing; None leaves it alone.  "{cores}" is replaced by their number.
        default: what holds if nobody sets it.
        when: until when it can be set.
        reason: why it has our value, or what it is for.
        form: how its reader takes it: a number of at least 1; a "flag" of paddle's own (0, 1, true, false); a "switch"
            of ours (0, 1; another value is an error); by "first letter" alone (the NPU plugin: t, T, y, Y and 1 are
            true, so is an empty text); numbers of cards; operator names; an allocator; a folder; a "duration".
        only: processors that it is set on; None for all.
        upstream: the value in PaddleMIX's NPU instructions, None where they have none.
        several: what is set instead of `value` in each process of a run of several; None leaves that as it is.
        limits: of a "duration", whole numbers in the variable's own unit.
    """

    name: str
    kinds: tuple[str, ...]
    value: str | None
    default: str
    when: When
    reason: str
    form: Form = "text"
    only: Literal["AMD"] | None = None
    upstream: str | None = None
    several: str | None = None
    limits: tuple[int, int] | None = None
