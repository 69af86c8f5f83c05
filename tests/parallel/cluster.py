"""Runs of several processes as tests see them: on the CPU with gloo, or on stand-in NPUs.

    def test_two_processes(cluster, world, tmp_path):
        recipe = world.recipe(tmp_path, sharding="stage1")
        outcome = cluster.run(2, "tools.supervised_finetune", recipe)
        assert outcome.statuses == [0, 0], outcome.told()

`cluster.call(2, "tests.parallel.probes:function", value=3)` runs a function of the tests on each process and brings
what it returns.  What a test does to one of the processes are `Hook`s:
`Hook("tests.parallel.hooks:nan_loss", rank=1, values={"step": 3})`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tests.conftest import HANG, ROOT
from tests.npu_double.build import PLAIN, STRICT, built_or_skipped, environment
from tests.parallel.rank import Hook

Where = Literal["cpu", "npu", "strict"]
DEVICES = 8  # stand-in NPUs of the machine


@dataclass(frozen=True)
class Outcome:
    """What the processes of a run left behind, each list by rank.

    Args:
        statuses: exit statuses, negative for a signal; -9 also where the time limit ended a process.
        logs: what each wrote to stdout and stderr.
        results: what the called function returned; None for a command.
        collectives: name -> calls and bytes, on stand-in NPUs; empty for a process that was killed.
    """

    statuses: list[int]
    logs: list[str]
    results: list[Any]
    collectives: list[dict[str, list[int]]]

    @property
    def ok(self) -> bool:
        """Whether every process ended well."""
        return not any(self.statuses)

    def told(self, lines: int = 25) -> str:
        """The last lines of every log, for a test's message."""
        ends = ("\n".join(log.splitlines()[-lines:]) for log in self.logs)
        return "\n".join(f"--- rank {rank}, status {self.statuses[rank]}\n{end}" for rank, end in enumerate(ends))


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """How a job is run.

    Args:
        where: on the CPU with gloo, or on stand-in NPUs; "strict" ones have the operators of the real plugin alone, and
            logs name those that go to the host.
        hooks: what is done to its processes before they begin.
        variables: of their environment, set after the import of paddle; the same in all.
        limit: seconds after which all are killed.
        patience: seconds that the others have after the first has failed.
    """

    where: Where = "cpu"
    hooks: Sequence[Hook] = ()
    variables: Mapping[str, str] | None = None
    limit: float = HANG
    patience: float = 20.0


def job_of(folder: Path, ranks: int, target: str, values: dict[str, Any], how: Circumstances) -> dict[str, Any]:
    """What `tests.parallel.rank` runs; `folder` takes logs and reports."""
    return {
        "folder": str(folder),
        "ranks": ranks,
        "where": how.where,
        "target": target,
        "values": values,
        "hooks": [asdict(hook) for hook in how.hooks],
        "variables": dict(how.variables or {}),
        "limit": how.limit,
        "patience": how.patience,
    }


def outcome_of(folder: Path, statuses: list[int]) -> Outcome:
    """What a job's folder holds."""
    logs, reports = [], []
    for rank in range(len(statuses)):
        log, report = folder / f"rank-{rank}.log", folder / f"report-{rank}.json"
        logs.append(log.read_text(encoding="utf-8", errors="replace") if log.exists() else "")
        reports.append(json.loads(report.read_text(encoding="utf-8")) if report.exists() else {})
    results = [report.get("result") for report in reports]
    return Outcome(statuses, logs, results, [report.get("collectives", {}) for report in reports])


class Cluster:
    """Starts runs of several processes; a server for each kind of device is started when it is first needed.

    Args:
        folder: for logs and reports, empty.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._servers: dict[Where, subprocess.Popen[str]] = {}

    def run(self, ranks: int, command: str, *arguments: Any, **how: Any) -> Outcome:
        """Runs `paddlemix.COMMAND`'s main with the same arguments in every process.

        Args:
            ranks: processes; 1 runs it as one process that no launcher started.
            how: fields of `Circumstances`.
        """
        texts = [str(item) for item in arguments]
        return self._run(ranks, f"paddlemix.{command}", {"arguments": texts}, Circumstances(**how))

    def call(self, ranks: int, target: str, how: Circumstances | None = None, **values: Any) -> Outcome:
        """Runs a function in every process.

        Args:
            target: "module:function"; what it returns must be a JSON value.
            values: its named arguments, JSON values.
        """
        return self._run(ranks, target, values, how or Circumstances())

    def _run(self, ranks: int, target: str, values: dict[str, Any], how: Circumstances) -> Outcome:
        folder = self._folder / str(self._count)
        folder.mkdir(parents=True)
        self._count += 1
        server = self._server(how.where)
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(job_of(folder, ranks, target, values, how)) + "\n")
        server.stdin.flush()
        return outcome_of(folder, json.loads(server.stdout.readline()))

    def _server(self, where: Where) -> subprocess.Popen[str]:
        if where not in self._servers:
            self._servers[where] = subprocess.Popen(
                [sys.executable, "-m", "tests.parallel.server", where],
                cwd=ROOT,
                env=device_environment(where),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        return self._servers[where]

    def close(self) -> None:
        """Ends the servers."""
        for server in self._servers.values():
            assert server.stdin is not None
            server.stdin.close()
            server.wait(timeout=HANG)


def device_environment(where: Where) -> dict[str, str]:
    """The environment of processes on such devices, as paddle reads it while it is imported."""
    if where == "cpu":
        return environment(None)
    told = {"GLOG_vmodule": "kernel_fact*=3", "GLOG_minloglevel": "0"}
    more = {**STRICT, **PLAIN, **told} if where == "strict" else {}
    return environment(built_or_skipped(), NPU_DOUBLE_DEVICES=str(DEVICES), FLAGS_use_stride_kernel="0", **more)
