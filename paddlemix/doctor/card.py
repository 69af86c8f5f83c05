"""The checks of one card, as a table: `paddlemix doctor --device gpu` or `npu`.

Nobody of this project has every card, so the table is made to be sent: what was computed, how far it is from the CPU,
how fast it was, what of that is slow, and which operators went to the host, where the card has none in their type.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from paddlemix.doctor.card_checks import MARK
from paddlemix.doctor.slow import slow_parts

# A driver that hangs never returns.
_LIMIT = 300  # seconds
_MISSING = re.compile(r"missing \w+ kernel: (\w+), expected_kernel_key:\(\w+, \S+, (\w+)\), fallbacking")
# At this level paddle logs the kernels for which it falls back to the CPU.  The pattern is short on purpose: paddle
# 3.3.1 frees a setting of 16 characters or more twice when a process ends, which then aborts or hangs.
_VERBOSE = {"GLOG_vmodule": "kernel_fact*=3", "GLOG_minloglevel": "0", "GLOG_logtostderr": "1"}


@dataclass
class CardReport:
    """What was found.

    Args:
        rows: name of a check and its result, in order.
        wrong: results that are not as they should be.
        on_host: check -> operators with their types that the card lacks.
        numbers: check -> TFLOP/s or seconds, of those that take time.
        slow: what is slower than it has to be, see `slow_parts`.
        complete: whether all checks finished.
    """

    rows: list[tuple[str, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    on_host: dict[str, list[str]] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    slow: list[str] = field(default_factory=list)
    complete: bool = True

    def lines(self) -> list[str]:
        """The table."""
        width = max((len(name) for name, _ in self.rows), default=0)
        lines = [f"{name:{width}}  {result}" for name, result in self.rows]
        lines += [f"slow: {what}" for what in self.slow]
        if self.rows and self.complete and not self.slow:
            lines.append("slow: nothing that these checks see")
        for check, operators in self.on_host.items():
            lines.append(f"on the host in {check}: {', '.join(operators)}")
        if not self.complete:
            return [*lines, "on the host: unknown for the checks that did not finish"]
        return lines if self.on_host else [*lines, "on the host: no operator"]


def check_card(device: str, limit: float = _LIMIT) -> CardReport:
    """Runs the checks of `card_checks` in their own process.

    Args:
        device: of the card, as `select_device` takes it.
        limit: seconds after which they are ended.
    """
    # a checkout that was never installed is not on the path of another process
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    # Its own process: the logging level has to be set before paddle loads, and a plugin may abort.
    command = [sys.executable, "-m", "paddlemix.doctor.card_checks", device]
    environment = {**os.environ, **_VERBOSE, "PYTHONPATH": paths}
    ended = ""
    try:
        # a bad driver can hang or abort the whole process; the report is then still written, by this one
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", timeout=limit)
        out, log = done.stdout, done.stderr
        if done.returncode:
            ended = f"the checks ended with status {done.returncode}: {_last_line(log)}"
    except subprocess.TimeoutExpired as stopped:
        out, log = (_text(part) for part in (stopped.stdout, stopped.stderr))
        ended = f"the checks took longer than {limit:.0f} s"
    return _report(out, log, ended)


def _report(out: str, log: str, ended: str) -> CardReport:
    report = CardReport()
    for line in out.splitlines():
        # a plugin may print lines of its own among the rows
        if not line.startswith('{"check"'):
            continue
        row = json.loads(line)
        report.rows.append((row["check"], row["result"]))
        if row.get("number") is not None:
            report.numbers[row["check"]] = row["number"]
        if row["wrong"]:
            report.wrong.append(f"{row['check']}: {row['wrong']}")
    # Which check an operator belongs to is told by the marks between the lines.
    check, found = "start", dict[str, set[str]]()
    for line in log.splitlines():
        if line.startswith(MARK):
            check = line.removeprefix(MARK)
        elif missing := _MISSING.search(line):
            found.setdefault(check, set()).add(" ".join(missing.groups()))
    report.on_host = {name: sorted(operators) for name, operators in found.items()}
    fused = [row for row in report.rows if row[0].startswith("fused, ")]
    report.slow = slow_parts(report.numbers, fused, report.on_host)
    report.complete = not ended
    if ended:
        report.wrong.append(ended)
    return report


def _text(part: str | bytes | None) -> str:
    # after a timeout the outputs are bytes even with text=True
    return part.decode("utf-8", "replace") if isinstance(part, bytes) else part or ""


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2][:200]
