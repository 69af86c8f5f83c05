"""Runs started by Paddle's own launcher, for what is about the launcher itself: each process loads paddle, which takes
seconds.  Everything else is quicker with `tests.parallel.cluster`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.conftest import HANG, ROOT
from tests.parallel.cluster import Circumstances, Outcome, device_environment, job_of, outcome_of

_RANK = ROOT / "tests" / "parallel" / "rank.py"


class Launched:
    """A command that `python -m paddle.distributed.launch` has started in several processes.

    Args:
        folder: for logs and reports, empty.
        ranks: processes.
        target: "paddlemix.tools.supervised_finetune", or "module:function" of the tests.
        values: {"arguments": [...]} of a command, or the function's named arguments.
        how: `hooks`, `where`, `variables`; `limit` is for `wait`.
        options: more of the launcher's, e.g. "--nnodes=2".

    Attributes:
        launcher: the launcher's process; `launcher.send_signal` reaches it alone.
    """

    def __init__(
        self,
        folder: Path,
        ranks: int,
        target: str,
        values: dict[str, Any],
        how: Circumstances,
        options: tuple[str, ...] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._ranks, self._limit = folder, ranks, how.limit
        job = folder / "job.json"
        job.write_text(json.dumps(job_of(folder, ranks, target, values, how)), encoding="utf-8")
        devices = ",".join(map(str, range(ranks)))
        count = ["--nproc_per_node", str(ranks)] if how.where == "cpu" else ["--devices", devices]
        logs = ["--log_dir", str(folder / "logs")]
        self._output = folder / "launcher.log"
        with self._output.open("w") as output:
            self.launcher = subprocess.Popen(
                [sys.executable, "-m", "paddle.distributed.launch", *count, *logs, *options, str(_RANK), str(job)],
                cwd=folder,
                env={**device_environment(how.where), "PYTHONPATH": str(ROOT), **(how.variables or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        """What the launcher has written so far."""
        return self._output.read_text(encoding="utf-8", errors="replace")

    def pid(self, rank: int) -> int:
        """The id of a process, for signals; waits until it has begun."""
        path, end = self._folder / f"pid-{rank}", time.monotonic() + self._limit
        while not (path.exists() and path.read_text()):
            assert self.launcher.poll() is None and time.monotonic() < end, self.output
            time.sleep(0.02)
        return int(path.read_text())

    def wait(self) -> tuple[int, Outcome]:
        """Waits for the end, or kills everything after the time limit.

        Returns:
            The launcher's status, and what its processes left; their own statuses are not known, all are the
            launcher's.
        """
        try:
            status = self.launcher.wait(timeout=min(self._limit, HANG))
        except subprocess.TimeoutExpired:
            self.kill()
            status = self.launcher.wait()
        for rank in range(self._ranks):
            log = self._folder / "logs" / f"workerlog.{rank}"
            if log.exists():
                os.replace(log, self._folder / f"rank-{rank}.log")
        return status, outcome_of(self._folder, [status] * self._ranks)

    def kill(self) -> None:
        """Kills the launcher and every process that has begun."""
        self.launcher.kill()
        for rank in range(self._ranks):
            path = self._folder / f"pid-{rank}"
            if path.exists():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(path.read_text()), signal.SIGKILL)
