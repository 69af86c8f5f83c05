"""Launchers of fake workers, in this process and in one of their own."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paddlemix.launch import supervisor
from paddlemix.launch.cards import Cards
from paddlemix.launch.launcher import Job, launch
from paddlemix.launch.options import LaunchOptions
from paddlemix.tools.common.command import run_command
from paddlemix.tools.launch import main
from tests.conftest import HANG, ROOT

FAKE = Path(__file__).with_name("fake_worker.py")
Plan = dict[str, list[str]]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardly any patience for workers that do not end after a failure."""
    monkeypatch.setattr(supervisor, "_TICK", 0.05)
    monkeypatch.setattr(supervisor, "_SETTLE", 0.05)
    monkeypatch.setattr(supervisor, "_GRACE", 0.1)


@pytest.fixture
def run_here(tmp_path: Path, impatient: None) -> Callable[..., int]:
    """Launches fake workers in this process."""

    def run(
        plan: Plan, processes: int = 2, results: tuple[int, ...] = (), reports_begin: bool = True, **options: object
    ) -> int:
        job = Job(
            FAKE,
            [str(tmp_path), json.dumps(plan)],
            LaunchOptions(**options),  # type: ignore[arg-type]
            Cards("cpu", (), (), processes),
            tmp_path / "logs",
            frozenset(results),
            reports_begin,
        )
        return launch(job, {**os.environ, "PYTHONPATH": str(ROOT)})

    return run


class Started:
    """A launcher of its own process, forked so that nothing has to be loaded again."""

    def __init__(self, folder: Path, plan: Plan, options: list[str], environment: dict[str, str]) -> None:
        self.folder, self.output = folder, folder / "launcher.log"
        arguments = [str(FAKE), str(folder), json.dumps(plan), *options]
        self.pid = os.fork()
        if not self.pid:
            try:
                self._launch(arguments, environment)
            finally:
                os._exit(99)
        self._status: int | None = None

    def _launch(self, arguments: list[str], environment: dict[str, str]) -> None:
        descriptor = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        os.chdir(self.folder)
        os.environ.update({"PYTHONPATH": str(ROOT), **environment})
        try:
            status = run_command(main, arguments)
        except SystemExit as end:
            status = int(end.code or 0)
        sys.stderr.flush()
        os._exit(status)

    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._status is None and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def send(self, number: int) -> None:
        """Sends it a signal."""
        os.kill(self.pid, number)

    def wait_for(self, *names: str) -> None:
        """Until the workers have left these files."""
        end = time.monotonic() + HANG
        while not all((self.folder / name).exists() for name in names):
            assert self.is_running() and time.monotonic() < end, self.told()
            time.sleep(0.02)

    def told(self) -> str:
        """What it has said."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def status(self) -> int:
        """When it has ended."""
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status


@pytest.fixture
def started(tmp_path: Path, impatient: None) -> Iterator[Callable[..., Started]]:
    """Starts launchers of fake workers; those that are left are ended."""
    launchers: list[Started] = []

    def start(plan: Plan, *options: str, **environment: str) -> Started:
        launchers.append(Started(tmp_path, plan, list(options), environment))
        return launchers[-1]

    yield start
    for launcher in launchers:
        if launcher.is_running():
            launcher.send(signal.SIGKILL)  # its workers end with it
        launcher.status()
