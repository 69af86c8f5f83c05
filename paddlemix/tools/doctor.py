"""Reports what is installed, which devices are available, which settings are in force and why, and what is wrong.

    python paddlemix/tools/doctor.py [--device NAME] [--no-self-test]

A tiny model is trained and queried on every device.  A card named by --device is also checked: precision, speed, fused
kernels, missing operators.  The exit status is 1 if something is wrong that would affect a run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run by path: modules are looked up from the checkout's root, not from this folder
    _here = Path(__file__).resolve()
    sys.path[:] = [str(_here.parents[2]), *(p for p in sys.path if Path(p).resolve() != _here.parent)]

from paddlemix.doctor.examination import Examination, examine
from paddlemix.tools.common.arguments import CommandParser
from paddlemix.tools.common.command import run_command

STATUS_UNHEALTHY = 1


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = CommandParser("doctor", __doc__)
    parser.add_argument("--device", help="examine only this device: gpu, npu, xpu or cpu, or one card (npu:1)")
    parser.add_argument("--no-self-test", action="store_true", help="skip training and querying the tiny model")
    return parser


def main(argv: list[str]) -> int:
    """Prints the examination.

    Returns:
        0, or 1 if something is wrong.
    """
    arguments = build_parser().parse_args(argv)
    found = examine(arguments.device, not arguments.no_self_test)
    print(format_examination(found))
    return 0 if found.healthy else STATUS_UNHEALTHY


def format_examination(found: Examination) -> str:
    """The sections, then what is wrong and what to do about it."""
    lines: list[str] = []
    for title, section in found.sections.items():
        lines += [title, *(f"  {line}" for line in section), ""]
    if not found.problems:
        return "\n".join([*lines, "nothing is wrong"])
    lines.append("what is wrong" if not found.healthy else "nothing is wrong that stops a run, but")
    for number, problem in enumerate(found.problems, start=1):
        # Problems that are not serious do not change the exit status.
        mark = "" if problem.serious else " (still works)"
        lines += [f"  {number}. {problem.what}{mark}", f"     to do: {problem.fix}"]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
