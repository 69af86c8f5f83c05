"""The worker's side: it ends with its launcher, and leaves a word about why it failed."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import io
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from paddlemix.errors import UserError
from paddlemix.launch.variables import FAILURE_FILE, LAUNCHER, TERMINAL, begin_file

INTERRUPTED = "interrupted"  # in place of an error's kind: Ctrl-C before there was anything to save
_PR_SET_PDEATHSIG = 1  # Source: linux/prctl.h
_LONGEST_MESSAGE = 4000  # characters

_failure_file: str | None = None
_is_worker = False


def begin_worker() -> None:
    """What a process does first; nothing where no launcher of ours started it."""
    global _failure_file, _is_worker
    # Taken out, so that commands which this one starts do not take themselves for workers.
    launcher, _failure_file = os.environ.pop(LAUNCHER, ""), os.environ.pop(FAILURE_FILE, None)
    has_terminal = os.environ.pop(TERMINAL, "") == "1"
    if not launcher.isdecimal():
        return
    _is_worker = True
    _end_with(int(launcher))
    if not has_terminal:
        sys.stdout, sys.stderr = _kept(1, sys.stdout), _kept(2, sys.stderr)


def report_begin() -> None:
    """Tells the launcher that all input was right and the work begins; nothing where there is none.

    From here on the logs are worth keeping, however the run ends.
    """
    if _failure_file is not None:
        with contextlib.suppress(OSError):
            begin_file(Path(_failure_file)).touch()


def end_worker(status: int) -> None:
    """Ends a worker that has done its work; nothing where no launcher of ours started it.

    Not by the interpreter's own end, after which libraries are unloaded: network threads of paddle that still wait for
    a process which ends too can abort there, and a run that has saved everything would count as failed.
    """
    if not _is_worker:
        return
    # What the interpreter would do before: threads that still write, and what was registered for the end.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def report_failure(error: BaseException) -> None:
    """Tells the launcher why and when this process fails; nothing where there is none."""
    if _failure_file is None:
        return
    if isinstance(error, KeyboardInterrupt):
        kind, message = INTERRUPTED, ""
    else:
        kind, message = type(error).__name__, str(error)[:_LONGEST_MESSAGE]
    # By its class, since a user can cause more than the errors of that very name.
    is_users = isinstance(error, UserError)
    text = json.dumps({"time": time.time(), "kind": kind, "is_users": is_users, "message": message})
    # Renamed, so that the launcher never reads half; without it, it has the exit status.
    with contextlib.suppress(OSError):
        beside = Path(_failure_file + ".tmp")
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, _failure_file)


def _end_with(launcher: int) -> None:
    """Asks the system for SIGTERM when the launcher dies: this process then saves and ends."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != launcher:  # it died before it was asked
            os.kill(os.getpid(), signal.SIGTERM)


class _Unread(io.FileIO):
    """An output whose reader may go away: what is written then is lost, and nobody is disturbed while saving."""

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = left.nbytes
        with contextlib.suppress(OSError):
            while left:
                left = left[super().write(left) :]
        return size


def _kept(descriptor: int, stream: TextIO) -> TextIO:
    raw: Any = _Unread(descriptor, "wb", closefd=False)
    # Nothing is held back, as under `python -u`: what a process that is killed said last is in its log.
    return io.TextIOWrapper(raw, encoding=stream.encoding, errors="backslashreplace", write_through=True)
