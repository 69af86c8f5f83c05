"""What the first process says, shown in the terminal as if it had been started alone, and kept in its log.

On a terminal it gets a terminal of its own, so that it draws its bar; the log gets the bar's last state alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import sys
import termios
from pathlib import Path
from typing import BinaryIO

_CHUNK = 1 << 16  # bytes
_LONGEST_LINE = 1 << 20  # bytes; of what has no end by then the last state is kept
_MOST_PENDING = 1 << 20  # bytes that wait for a terminal that does not read
_ATOMIC = 4096  # bytes that a pipe takes at once when it is ready.  Source: Linux, PIPE_BUF
_LAST_WORDS = 2.0  # seconds that a terminal has to take the rest at the end


class LogLines:
    """Writes what came to a log line by line, without what a carriage return wrote over.

    Args:
        file: opened to append.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._rest = file, b""

    def write(self, data: bytes) -> None:
        """Adds to it; an unfinished line is kept until the next call."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._file.write(_last_state(line) + b"\n")
        if len(self._rest) > _LONGEST_LINE:
            # A bar alone, redrawn for days, has no line end: its last state is all that is kept.
            self._rest = _last_state(self._rest)
        self._file.flush()

    def close(self) -> None:
        """Writes the unfinished line, and closes the file."""
        if self._rest:
            self._file.write(_last_state(self._rest) + b"\n")
        self._file.close()


def _last_state(line: bytes) -> bytes:
    return line.rstrip(b"\r").rpartition(b"\r")[2]


class Relay:
    """One output of a process, passed on.

    Args:
        shown_on: descriptor of ours that it is passed on to.
        log: gets it too.
    """

    def __init__(self, shown_on: int, log: LogLines) -> None:
        self._log = log
        self.is_terminal = os.isatty(shown_on)
        self._shown_on = _not_blocking(shown_on) if self.is_terminal else shown_on
        self._is_reopened = self._shown_on != shown_on
        self.reads, self.writes = os.openpty() if self.is_terminal else os.pipe()
        self.is_open, self._pending = True, b""
        if self.is_terminal:
            self._pass_through()
            self.resize()

    def _pass_through(self) -> None:
        """Line ends are left to the real terminal."""
        modes = termios.tcgetattr(self.writes)
        modes[1] &= ~termios.OPOST
        termios.tcsetattr(self.writes, termios.TCSANOW, modes)

    def resize(self) -> None:
        """Gives the process's terminal the size of ours."""
        if self.is_terminal and self.is_open:
            with contextlib.suppress(OSError):
                size = fcntl.ioctl(self._shown_on, termios.TIOCGWINSZ, b"\0" * 8)
                fcntl.ioctl(self.reads, termios.TIOCSWINSZ, size)

    def started(self) -> None:
        """The process has its end; ours is closed, so that its end ends the relay."""
        os.close(self.writes)

    def pump(self) -> None:
        """Takes what is there, for the log at once."""
        try:
            data = os.read(self.reads, _CHUNK)
        except OSError:  # a terminal whose last user is gone
            data = b""
        if not data:
            self.close()
            return
        # Neither a full disk nor a terminal that is gone or stopped (Ctrl-S, a lost connection) holds up the run.
        with contextlib.suppress(OSError):
            self._log.write(data)
        self._pending = (self._pending + data)[-_MOST_PENDING:]
        self.show()

    def show(self, seconds: float = 0.0) -> bool:
        """Passes on as much as is taken without waiting.

        Args:
            seconds: to wait for more to be taken.

        Returns:
            Whether something is left.
        """
        try:
            while self._pending and select.select([], [self._shown_on], [], seconds)[1]:
                self._pending = self._pending[os.write(self._shown_on, self._pending[:_ATOMIC]) :]
        except BlockingIOError:  # a terminal is ready as soon as it takes one byte
            pass
        except OSError:  # nobody reads any more
            self._pending = b""
        return bool(self._pending)

    def finish(self) -> None:
        """Passes on what a process that has ended left; one that it started may hold the other end open for ever."""
        if self.is_open:
            os.set_blocking(self.reads, False)
        while self.is_open:
            self.pump()
        self.show(_LAST_WORDS)
        if self._is_reopened:
            os.close(self._shown_on)

    def close(self) -> None:
        """Ends it."""
        if self.is_open:
            self.is_open = False
            os.close(self.reads)


def _not_blocking(terminal: int) -> int:
    """The same terminal, opened anew: the shell's own descriptor, which others use too, stays as it is."""
    with contextlib.suppress(OSError):
        return os.open(os.ttyname(terminal), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
    return terminal


def open_relays(log: Path) -> tuple[list[Relay], LogLines]:
    """Relays for standard output and error, one for both where they are the same file.

    Args:
        log: is appended to.

    Returns:
        One or two relays, the last one for standard error, and the log, to be closed after them.
    """
    sys.stdout.flush()
    lines = LogLines(open(log, "ab"))  # noqa: SIM115
    outputs = [1, 2]
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(1), os.fstat(2)):
            outputs = [2]
    return [Relay(output, lines) for output in outputs], lines
