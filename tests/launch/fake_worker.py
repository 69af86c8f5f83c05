"""A worker that loads nothing: `python fake_worker.py FOLDER 'what each rank does, as JSON'`.

Per rank, or "*" for the others, a list of steps; "ready" leaves its process id in FOLDER's `ready-RANK-RESTART`.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import sys
import threading
import time
import types
from pathlib import Path

from paddlemix.errors import Stopped, UserError
from paddlemix.launch.variables import RESTART
from paddlemix.launch.worker import report_begin
from paddlemix.log import logger, process_rank
from paddlemix.tools.common.command import run_command

_TICK = 0.02


class _Aborts(types.ModuleType):
    def __del__(self) -> None:
        os.abort()


class Fake:
    """What a worker can do, each method one step."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.got = folder, []

    def ready(self) -> None:
        beside = self.folder / f"begin-{process_rank()}"
        beside.write_text(str(os.getpid()))
        beside.rename(self.folder / f"ready-{process_rank()}-{os.environ[RESTART]}")

    def handle(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, frame: self.got.append(number))

    def train(self) -> None:
        """Until a signal; then a checkpoint, which takes as long as the test wants."""
        while not self.got:
            time.sleep(_TICK)
        (self.folder / f"saving-{process_rank()}").touch()
        while not (self.folder / "may-end").exists():
            time.sleep(_TICK)
        (self.folder / f"saved-{process_rank()}-{len(self.got)}").touch()
        raise Stopped(self.got[0])

    def wait(self) -> None:
        while True:
            time.sleep(_TICK)

    def begin(self) -> None:
        report_begin()

    def until_the_first_has_ended(self) -> None:
        """Whoever is called this is not the first process, which is `ready` before it ends."""
        while not (found := list(self.folder.glob("ready-0-*"))):
            time.sleep(_TICK)
        stat = Path(f"/proc/{found[0].read_text()}/stat")
        with contextlib.suppress(OSError):  # it is gone
            while stat.read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(_TICK)

    def user_error(self) -> None:
        raise UserError("lora_rank=-1 is below 1")

    def crash(self) -> None:
        raise RuntimeError("out of luck")

    def wait_once(self) -> None:
        if os.environ[RESTART] == "0":
            self.wait()

    def crash_once(self) -> None:
        if os.environ[RESTART] == "0":
            self.crash()

    def abort_at_the_end(self) -> None:
        """As a library does whose threads still run when it is unloaded; a file written by another thread is whole."""

        def write() -> None:
            time.sleep(10 * _TICK)
            (self.folder / f"written-{process_rank()}").touch()

        threading.Thread(target=write).start()
        atexit.register((self.folder / f"at-exit-{process_rank()}").touch)
        sys.modules["aborts"] = _Aborts("aborts")

    def stopped(self) -> None:
        raise Stopped(signal.SIGTERM)

    def killed(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def leave(self) -> None:
        os._exit(7)

    def leave_with_2(self) -> None:
        os._exit(2)

    def until_a_signal(self) -> None:
        while not self.got:
            time.sleep(_TICK)

    def wait_for_1(self) -> None:
        while not (self.folder / "ready-1-0").exists():
            time.sleep(_TICK)

    def wait_for_0(self) -> None:
        while not (self.folder / "ready-0-0").exists():
            time.sleep(_TICK)

    def hang_after_error(self) -> None:
        from paddlemix.launch.worker import report_failure

        report_failure(RuntimeError("a library hangs at the end"))
        self.wait()

    def say(self) -> None:
        print(f"answer of {process_rank()}")  # noqa: T201
        logger.info("rank %d, terminal %s", process_rank(), sys.stderr.isatty())

    def interrupted(self) -> None:
        raise KeyboardInterrupt

    def read(self) -> None:
        """A line of its input, and whose process group it is in."""
        line = sys.stdin.readline().strip()
        print(f"heard {line!r} of {'the' if os.getpgrp() == os.getpgid(os.getppid()) else 'another'} group")  # noqa: T201

    def environment(self) -> None:
        names = ("PADDLE_", "FLAGS_selected_", "MASTER_", "PADDLEMIX_RESTART")
        found = {name: value for name, value in os.environ.items() if name.startswith(names)}
        (self.folder / f"environment-{process_rank()}").write_text(json.dumps(found))


def main(argv: list[str]) -> int:
    fake, plan = Fake(Path(argv[0])), json.loads(argv[1])
    for step in plan.get(str(process_rank()), plan.get("*", [])):
        getattr(fake, step)()
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
