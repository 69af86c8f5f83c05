"""Runs a command in child processes that need no time to load: one process loads paddle and forks them.

Started as a process of its own, `python -m tests.trainer.fork_server COMMAND LOADED`; it computes nothing itself,
because what paddle starts for that does not survive a fork. Per line of its input, a JSON list [arguments, log file,
file size limit in bytes or null], it starts a child and answers with two lines: the child's process id, and when it
has ended its status, negative for a signal.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.conftest import ROOT


class ForkServer:
    """The other end: starts commands and waits for them.

    Args:
        folder: for the children's logs.
        command: the module whose `main` runs.
        loaded: a module that is imported before.
    """

    def __init__(
        self,
        folder: Path,
        command: str = "paddlemix.tools.supervised_finetune",
        loaded: str = "paddlemix.trainer.recipe",
    ) -> None:
        self._folder, self._count = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.trainer.fork_server", command, loaded],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, arguments: list[str], watch: Callable[[int], None] | None = None, limit: int | None = None
    ) -> tuple[int, str]:
        """Runs the command once.

        Args:
            arguments: its arguments.
            watch: is called with the process id while the command runs.
            limit: largest file that it may write, bytes.

        Returns:
            Its status, negative for a signal, and what it wrote to stderr.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        log = self._folder / f"{self._count}.log"
        self._count += 1
        self._process.stdin.write(json.dumps([arguments, str(log), limit]) + "\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        if watch is not None:
            watch(pid)
        return int(self._process.stdout.readline()), log.read_text(encoding="utf-8")

    def close(self) -> None:
        """Ends the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def is_running(pid: int) -> bool:
    """Whether a process has not ended yet; one that nobody waited for has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(pid: int, ready: Callable[[], bool]) -> bool:
    """Waits, looking all the time, until something holds or the process has ended; whether it held."""
    while not ready():
        if not is_running(pid):
            return ready()
        time.sleep(0.0003)
    return True


def _child(arguments: list[str], log: str, limit: int | None) -> int:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    from paddlemix.tools._command import run_command

    try:
        return run_command(importlib.import_module(sys.argv[1]).main, arguments)
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1


def _answer(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def _serve() -> None:
    importlib.import_module(sys.argv[2])  # what takes long

    for line in sys.stdin:
        arguments, log, limit = json.loads(line)
        pid = os.fork()
        if pid == 0:
            status = _child(arguments, log, limit)
            sys.stderr.flush()
            os._exit(status)
        _answer(pid)
        _, status = os.waitpid(pid, 0)
        _answer(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    _serve()
