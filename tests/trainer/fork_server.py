"""Runs a command in child processes that need no time to load: one process loads paddle and forks them.

Started as a process of its own, `python -m tests.trainer.fork_server COMMAND LOADED`; it computes nothing itself,
because what paddle starts for that does not survive a fork. Per line of its input, a JSON object with the fields of
`_Task`, it starts a child and answers with its status when that has ended, negative for a signal.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.conftest import HANG, ROOT
from tests.moments import Moment, watch


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
        self,
        arguments: list[str],
        moment: Moment | None = None,
        limit: int | None = None,
        touches: Path | None = None,
    ) -> tuple[int, str]:
        """Runs the command once.

        Args:
            arguments: its arguments.
            moment: when it sends itself which signal.
            limit: largest file that it may write, bytes.
            touches: a file that takes all its touches of files, see `tests.moments.watch`.

        Returns:
            Its status, negative for a signal, and what it wrote to stderr.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        log = self._folder / f"{self._count}.log"
        self._count += 1
        task = {
            "arguments": arguments,
            "log": str(log),
            "moment": None if moment is None else asdict(moment),
            "limit": limit,
            "touches": None if touches is None else str(touches),
        }
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline()), log.read_text(encoding="utf-8")

    def close(self) -> None:
        """Ends the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=HANG)


def _child(task: dict[str, Any]) -> int:
    descriptor = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if task["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (task["limit"], resource.RLIM_INFINITY))
    from paddlemix.tools.common.command import run_command

    try:
        main = importlib.import_module(sys.argv[1]).main
        watch(task["moment"] and Moment(**task["moment"]), task["touches"] and Path(task["touches"]))
        return run_command(main, task["arguments"])
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1


def _serve() -> None:
    importlib.import_module(sys.argv[2])  # what takes long

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            status = _child(json.loads(line))
            sys.stderr.flush()
            os._exit(status)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)  # noqa: T201  the answer


if __name__ == "__main__":
    _serve()
