"""One worker as a process of the system."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from paddlemix.launch.first_failure import Failure


@dataclass
class Worker:
    """One process.

    Args:
        has_terminal: see `WorkerStart`.
        code: see `Popen.returncode`, None while it runs.
    """

    rank: int
    process: subprocess.Popen[bytes]
    log: Path
    failure_file: Path
    has_terminal: bool = False
    code: int | None = None
    failure: Failure | None = None

    def kill(self) -> None:
        """Ends it, with the processes that it started, which are in its session."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.has_terminal:  # in our own group
                self.process.kill()
            else:
                os.killpg(self.process.pid, signal.SIGKILL)


@dataclass(frozen=True)
class WorkerStart:
    """What is needed to start one.

    Args:
        environment: returns all its variables, given the file for its failure.
        log: exists.
        is_shown: whether its output is shown too.
        has_terminal: whether it has our input and output themselves, and is reached by the terminal's signals.
    """

    rank: int
    command: Sequence[str]
    environment: Callable[[str], dict[str, str]]
    log: Path
    is_shown: bool
    has_terminal: bool = False


def start_process(
    start: WorkerStart, environment: dict[str, str], out: int | None, err: int | None
) -> subprocess.Popen[bytes]:
    """Starts it.

    Args:
        environment: all its variables.
        out, err: descriptors of its outputs; None for ours.
    """
    # how it is started   -> who hears of a terminal's Ctrl-C
    # with the terminal   -> it and the launcher, which leaves it to the worker
    # session of its own  -> the launcher alone, which asks each worker once
    return subprocess.Popen(
        start.command,
        env=environment,
        stdin=None if start.has_terminal else subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        start_new_session=not start.has_terminal,
    )
