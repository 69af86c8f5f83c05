"""Signals as something to wait for together with files: a launcher has one thread and one place where it waits."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType
from typing import Any

# What a user or a scheduler asks a run to stop by; a terminal or a connection that closes sends SIGHUP.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Repeats within this time are the same wish: schedulers, and Paddle's launcher, send a signal several times.
SAME_SIGNAL = 5  # seconds
_OTHERS = (signal.SIGCHLD, signal.SIGWINCH)  # a worker ended; the terminal's size changed

Readers = Mapping[int, Callable[[], None]]


class Signals:
    """While the block runs, signals wait until they are asked for.

    Those that the process was started with as ignored stay ignored, as under `nohup`.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._read, self._write = -1, -1
        self._wakeup_before = -1

    def __enter__(self) -> Signals:
        self._read, self._write = os.pipe()
        for descriptor in (self._read, self._write):
            os.set_blocking(descriptor, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write)
        for number in (*STOP_SIGNALS, *_OTHERS):
            if signal.getsignal(number) != signal.SIG_IGN or number in _OTHERS:
                self._before[number] = signal.signal(number, _noted)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._read)
        os.close(self._write)

    def wait(self, readers: Readers, seconds: float) -> list[int]:
        """Waits for a signal or until something can be read, and calls those readers.

        Args:
            readers: what to call, by descriptor.
            seconds: after which it returns in any case.

        Returns:
            The signals that came, in order.
        """
        try:
            ready, _, _ = select.select([self._read, *readers], [], [], seconds)
        except InterruptedError:
            ready = [self._read]
        numbers = list(self._came()) if self._read in ready else []
        for descriptor in ready:
            if descriptor != self._read and descriptor in readers:
                readers[descriptor]()
        return numbers

    def _came(self) -> bytes:
        try:
            return os.read(self._read, 4096)
        except BlockingIOError:
            return b""


def _noted(number: int, frame: FrameType | None) -> None:
    """The number is in the pipe already; a handler of Python's own is what puts it there."""


def is_in_foreground() -> bool:
    """Whether a terminal sends its Ctrl-C to this process and all of its group."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:  # there is none
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
