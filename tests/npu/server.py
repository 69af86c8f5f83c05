"""Runs commands in child processes with the stand-in NPU and tells what each did to the device.

One process, `python -m tests.npu.server`, imports the package once and forks: a child is as fresh as a command that is
started by path, and begins in a moment. `DeviceServer` is its other end. Per line of its input, a JSON object with the
command's module, arguments, input and folder, it answers with one line, the command's exit status.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import HANG, ROOT
from tests.npu_double.build import environment

_LOADED = ("paddlemix.trainer.recipe", "paddlemix.generation.predict_file", "paddlemix.generation.chat")


@dataclass(frozen=True)
class Outcome:
    """What a command left behind.

    Args:
        status: its exit status.
        out, err: what it wrote.
        report: see `tests.npu.watching.Watch.report`.
    """

    status: int
    out: str
    err: str
    report: dict[str, Any]


class DeviceServer:
    """Starts commands and waits for them.

    Args:
        folder: for logs, empty.
        plugin: see `tests.npu_double.build.build`; None runs on the CPU.
        variables: of the environment, beside the plugin's.
    """

    def __init__(self, folder: Path, plugin: Path | None, **variables: str) -> None:
        self._folder, self._count = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.npu.server"],
            cwd=ROOT,
            env=environment(plugin, **variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, command: str, *arguments: Any, stdin: str = "", memory: int | None = None) -> Outcome:
        """Runs `paddlemix.COMMAND`'s main with these arguments.

        Args:
            memory: of the device, MiB; None for what the double has by itself.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        folder = self._folder / str(self._count)
        folder.mkdir()
        self._count += 1
        (folder / "in").write_text(stdin, encoding="utf-8")
        job = {"module": f"paddlemix.{command}", "arguments": [str(item) for item in arguments], "memory": memory}
        self._process.stdin.write(json.dumps({**job, "folder": str(folder)}) + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        out, err = ((folder / name).read_text(encoding="utf-8", errors="replace") for name in ("out", "err"))
        path = folder / "report.json"
        return Outcome(status, out, err, json.loads(path.read_text()) if path.exists() else {})

    def close(self) -> None:
        """Ends the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=HANG)


def _child(job: dict[str, Any]) -> int:
    folder = Path(job["folder"])
    for descriptor, name in enumerate(("in", "out", "err")):
        opened = os.open(folder / name, os.O_RDONLY if name == "in" else os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, descriptor)
    if job["memory"] is not None:
        os.environ["NPU_DOUBLE_MEM_MB"] = str(job["memory"])
    from paddlemix.tools.common.command import run_command
    from tests.npu.watching import Watch

    watch = Watch()
    try:
        return run_command(importlib.import_module(job["module"]).main, job["arguments"])
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        (folder / "report.json").write_text(json.dumps(watch.report()))


def _serve() -> None:
    for name in _LOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            status = _child(json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
