"""How a process was started: alone, or by the launcher as one of several.  Asked before paddle loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Started:
    """How this process was started.

    Args:
        several: whether the run has other processes.
        local: processes of the run on this machine, >= 1.
    """

    several: bool = False
    local: int = 1


def how_started(environment: Mapping[str, str]) -> Started:
    """What the launcher says of this process; a value that is not a number is left for paddle to report."""

    def number(name: str) -> int:
        value = environment.get(name, "")
        return int(value) if value.isascii() and value.isdigit() else 1

    # Source: paddle.distributed.launch, controllers/collective.py
    return Started(several=number("PADDLE_TRAINERS_NUM") > 1, local=max(1, number("PADDLE_LOCAL_SIZE")))
