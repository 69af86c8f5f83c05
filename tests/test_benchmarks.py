"""Benchmarks leave nothing behind."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import HANG, ROOT

WORKER = "import json\nprint(json.dumps({'ready': True}), flush=True)\nwhile True:\n    pass\n"
DRIVER = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from turns import start_worker
print(start_worker("busy", sys.executable, sys.argv[2], [], 1).process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_benchmark_takes_its_workers_along(tmp_path: Path) -> None:
    """They would compute at full load for as long as the machine is on."""
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    arguments = [str(ROOT / "benchmarks"), str(tmp_path / "worker.py")]
    done = subprocess.run([sys.executable, "-c", DRIVER, *arguments], capture_output=True, text=True, timeout=HANG)
    status, end = Path(f"/proc/{int(done.stdout)}/stat"), time.monotonic() + HANG
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] not in "ZX":
        assert time.monotonic() < end
        time.sleep(0.01)
