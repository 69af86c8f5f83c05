"""A forked process that waits in the middle of something until it is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest


@pytest.fixture
def child() -> Iterator[Callable[[Callable[[], None]], int]]:
    """Runs a function in a forked process up to where it says so; that then waits until it is killed."""
    started: list[int] = []

    def start(body: Callable[[], None]) -> int:
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                os.close(read)
                ready = lambda: (os.write(write, b"."), os.close(write), signal.pause())  # noqa: E731
                body(ready)  # type: ignore[call-arg]
            finally:
                os._exit(1)
        os.close(write)
        started.append(pid)
        assert os.read(read, 1) == b"."
        os.close(read)
        return pid

    yield start
    for pid in started:
        kill(pid)


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
