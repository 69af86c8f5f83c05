"""Which process failed first, and that in words.

The others' errors follow from it: a process whose peer is gone fails in its next exchange, milliseconds later.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paddlemix.errors import fit_to_show
from paddlemix.launch.events import STOP_SIGNALS
from paddlemix.launch.worker import INTERRUPTED

USER_ERROR = 2  # the exit status of a `UserError`, which the same command would meet again
# A kill from outside follows from no other failure, so it comes before errors that were noticed up to this long before
# it: a busy machine may see it only after what it caused.
_KILLED_FIRST = 5.0  # seconds
_COUNTERS = Path("/proc/vmstat")
STOPPED = tuple(128 + number for number in STOP_SIGNALS)  # statuses of a process that was asked to stop
_SENT = tuple(
    -number for number in (signal.SIGKILL, *STOP_SIGNALS)
)  # as `Popen.returncode`; none is a crash of its own


@dataclass(frozen=True)
class Failure:
    """Why a process ended.

    Args:
        time: when, seconds since the epoch, by this machine's clock.
        status: as a shell reports it; 128 + the signal.
        rank: of the process; None for a whole machine that is gone.
        message: its error.
        is_killed: whether a signal ended it that somebody sent: SIGKILL, or one that asks to stop; and not we.
        log: where its output is.
    """

    time: float
    status: int
    rank: int | None = None
    message: str = ""
    is_killed: bool = False
    log: str = ""

    @property
    def is_final(self) -> bool:
        """Whether starting again would only fail again."""
        return self.status == USER_ERROR

    @property
    def is_crash(self) -> bool:
        """Whether starting again may help, and nobody has asked for an end."""
        return not self.is_final and self.status not in STOPPED

    def to_message(self) -> dict[str, Any]:
        """For another machine, whose clock may differ: its age in place of its time."""
        return asdict(self) | {"time": time.time() - self.time}

    @classmethod
    def from_message(cls, values: Mapping[str, Any]) -> Failure:
        """The other direction."""
        return cls(**{**values, "time": time.time() - values["time"]})


def first_failure(failures: Iterable[Failure]) -> Failure:
    """The one that the others follow from; at least one is given."""
    in_order = sorted(failures, key=lambda failure: failure.time)
    killed = [failure for failure in in_order if failure.is_killed]
    if killed and killed[0].time - in_order[0].time < _KILLED_FIRST:
        return killed[0]
    # All processes may find the same fault in the user's input: the first rank's is on the screen already.
    same = [failure for failure in in_order if failure.message and failure.message == in_order[0].message]
    return min(same, key=lambda failure: failure.rank or 0) if same else in_order[0]


def failure_of(rank: int, code: int | None, file: Path, seen: float, log: str, out_of_memory: bool) -> Failure:
    """What is known of a process that failed.

    Args:
        code: as `Popen.returncode`, negative for a signal; None while it is still running.
        file: where it left why, if it could.
        seen: when its end was noticed.
        out_of_memory: whether the system has ended processes for lack of memory since the start.
    """
    left = read_failure_file(file)
    if left is None:
        status = 1 if code is None else 128 - code if code < 0 else code
        return Failure(
            time=seen,
            status=status,
            rank=rank,
            message=_ending(code, out_of_memory),
            is_killed=code in _SENT,
            log=log,
        )
    is_users = bool(left["is_users"])
    message = str(left["message"]) if is_users else f"{left['kind']}: {left['message']}".rstrip(": ")
    is_interrupted = left["kind"] == INTERRUPTED
    default = USER_ERROR if is_users else 128 + signal.SIGINT if is_interrupted else 1
    status = code if code is not None and code > 0 else default
    return Failure(
        time=min(seen, float(left["time"])),
        status=status,
        rank=rank,
        message=fit_to_show(message),
        is_killed=is_interrupted,
        log=log,
    )


def read_failure_file(file: Path) -> dict[str, Any] | None:
    """What a worker left about its failure; None if nothing."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) and {"time", "kind", "is_users", "message"} <= set(values) else None


def _ending(code: int | None, out_of_memory: bool) -> str:
    if code is None:
        return "it does not end"
    if code >= 0:
        return f"it ended with status {code} and no error of its own"
    if code == -signal.SIGKILL:
        if out_of_memory:
            return "killed (SIGKILL); the system has ended processes for lack of memory since the start, see dmesg"
        return "killed (SIGKILL), by hand or by a limit on memory"
    name = signal.Signals(-code).name
    return f"ended by {name}" + (", a crash inside paddle, a driver or a library" if -code in _CRASHES else "")


_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)


def memory_kills() -> int:
    """How many processes the system has ended for lack of memory since it runs; 0 where it does not say."""
    try:
        lines = _COUNTERS.read_text().splitlines()
    except OSError:
        return 0
    # One count of the whole machine, of containers' limits too.  Source: linux/vm_event_item.h, OOM_KILL
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
