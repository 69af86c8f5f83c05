"""Libraries that take turns: each runs in a process of its own, works when told to and sleeps while the others do.

`take_turns` is the side of the worker, `Worker` that of the driver.  Loads nothing heavy, so that a worker's memory is
its library's own.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

REST_SECONDS = 0.3  # threads of a finished step may spin for 0.2 s


def claim_output() -> TextIO:
    """This process's standard output; what libraries print goes to standard error from now on."""
    output, sys.stdout = sys.stdout, sys.stderr
    return output


def take_turns(output: TextIO, works: Mapping[str, Callable[[], Any]]) -> None:
    """Does what the driver asks for, line by line, until its lines end; answers each with a line of JSON.

    Args:
        output: where answers go.
        works: name -> what is timed; what it gives goes into the answer.
    """
    print(json.dumps({"ready": True}), file=output, flush=True)
    for line in sys.stdin:
        name, _, count = line.strip().partition(" ")
        answer: dict[str, Any]
        if name == "memory":
            answer = {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        else:
            answer = {"seconds": [], "values": []}
            for _ in range(int(count)):
                start = time.perf_counter()
                answer["values"].append(works[name]())
                answer["seconds"].append(time.perf_counter() - start)
        print(json.dumps(answer), file=output, flush=True)


@dataclass
class Worker:
    """A process that works when told to.

    Args:
        name: for messages.
        process: with pipes for its commands and answers.
        seconds, values: per kind of work, of every time so far, warm-up included.
    """

    name: str
    process: subprocess.Popen[str]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    values: dict[str, list[Any]] = field(default_factory=dict)

    def ask(self, command: str) -> dict[str, Any]:
        """Sends a line and gives the answer.

        Raises:
            SystemExit: the worker ended; its own errors stand above.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line that the worker writes."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker {self.name} ended with code {self.process.wait()}")
        return json.loads(line)

    def work(self, name: str, count: int = 1) -> None:
        """Some turns at one kind of work."""
        answer = self.ask(f"{name} {count}")
        self.seconds.setdefault(name, []).extend(answer["seconds"])
        self.values.setdefault(name, []).extend(answer["values"])

    def stop(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()


def prepared_environment(threads: int) -> dict[str, str]:
    """Variables of every worker, whose library it may be.

    Paddle's math library takes its slow generic kernels on AMD's processors unless it is told otherwise, as our package
    does by itself; a peer without it would be 27 times slower, which says nothing about the peer.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error"}
    if "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        environment.setdefault("MKL_DEBUG_CPU_TYPE", "5")
    return environment


_LIBRARY = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # Source: linux/prctl.h


def end_with_driver() -> None:
    """In a new worker, before its program: the system kills it when its driver ends, in whatever way."""
    _LIBRARY.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def start_worker(name: str, python: str | Path, script: Path, arguments: Sequence[str], threads: int) -> Worker:
    """Starts a worker and waits until it is ready."""
    process = subprocess.Popen(
        [str(python), str(script), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=prepared_environment(threads),
        preexec_fn=end_with_driver,
    )
    worker = Worker(name, process)
    worker.answer()
    return worker
