"""One process of a run of several: where it is in the run, what a test does to it, what it runs, what it leaves behind.

Forked by `tests.parallel.server`, or started by Paddle's own launcher, `python -m paddle.distributed.launch ...
tests/parallel/rank.py JOB.json`.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the launcher starts files, not modules
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.npu_double.build import LIBRARY


@dataclass(frozen=True)
class Hook:
    """What a test does to processes before their command begins.

    Args:
        target: "module:function"; functions that many tests need are in `tests.parallel.hooks`.
        rank: of the one process; None for every process.
        values: the function's named arguments, JSON values.
    """

    target: str
    rank: int | None = None
    values: dict[str, Any] = field(default_factory=dict)


def run_job(job: dict[str, Any], rank: int) -> int:
    """Runs a job, see `tests.parallel.cluster.job_of`, as process `rank`.

    Its folder takes `pid-RANK` at once and `report-RANK.json` at the end.

    Returns:
        The exit status.
    """
    report: dict[str, Any] = {}
    folder = Path(job["folder"])
    (folder / f"pid-{rank}").write_text(str(os.getpid()), encoding="utf-8")
    try:
        for hook in job["hooks"]:
            if hook["rank"] in (None, rank):
                _function(hook["target"])(**hook["values"])
        report["result"] = _run_target(job)
        return 0
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        report["collectives"] = _collectives() if job["where"] != "cpu" else {}
        (folder / f"report-{rank}.json").write_text(json.dumps(report), encoding="utf-8")


def _function(target: str) -> Any:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def _run_target(job: dict[str, Any]) -> Any:
    if ":" in job["target"]:
        return _function(job["target"])(**job["values"])
    from paddlemix.tools.common.command import run_command

    status = run_command(importlib.import_module(job["target"]).main, job["values"]["arguments"])
    if status:
        raise SystemExit(status)
    return None


def _collectives() -> dict[str, list[int]]:
    """ "name:type" -> calls and bytes of what this process took part in on the stand-in NPU."""
    library = ctypes.CDLL(str(Path(os.environ["CUSTOM_DEVICE_ROOT"]) / LIBRARY))
    library.npu_double_ccl_ran.restype = ctypes.c_char_p
    entries = filter(None, library.npu_double_ccl_ran().decode().split(","))
    pairs = (entry.split("=") for entry in entries)
    return {name: [int(number) for number in numbers.split("/")] for name, numbers in pairs}


if __name__ == "__main__":
    sys.exit(run_job(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), int(os.environ["PADDLE_TRAINER_ID"])))
