"""`paddlemix launch` on two machines with a real run: a crash, the start after it, and a stop of that.

Every process loads paddle, so that this is one test.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paddlemix.checkpoints.files.weight_files import read_json
from paddlemix.launch.variables import RESTART
from paddlemix.launch.worker_environment import free_ports
from paddlemix.log import read_metrics
from tests.conftest import HANG, ROOT
from tests.parallel.cluster import Circumstances, job_of
from tests.parallel.hooks import signal_in_step
from tests.parallel.rank import Hook
from tests.tiny_world import World

RANK = ROOT / "tests" / "parallel" / "rank.py"


def killed_in_the_first_start(step: int) -> None:
    """A hook."""
    if os.environ[RESTART] == "0":
        signal_in_step(step, signal.SIGKILL)


def job_file(world: World, folder: Path) -> Path:
    """Rank 1 is killed in step 4 of the first start; in the second it waits in step 6 until `go` is there."""
    hooks = [
        Hook(f"{__name__}:killed_in_the_first_start", rank=1, values={"step": 4}),
        Hook("tests.parallel.hooks:file_in_step", rank=0, values={"step": 6, "path": str(folder / "in-step")}),
        Hook("tests.parallel.hooks:wait_in_step", rank=1, values={"step": 6, "until": str(folder / "go")}),
    ]
    config = world.recipe(folder, max_steps=50, save_strategy="steps", save_steps=2)
    values = {"arguments": [str(config)]}
    job = folder / "job.json"
    job.write_text(
        json.dumps(job_of(folder, 2, "paddlemix.tools.supervised_finetune", values, Circumstances(hooks=hooks)))
    )
    return job


@pytest.fixture
def machines(world: World, tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The launchers of two machines, here one, with a process each; what they say goes to `machine-N.log`."""
    job, logs = job_file(world, tmp_path), tmp_path / "out" / "logs" / "ranks"
    port = free_ports(1, {})[0]
    both = ["--nproc", "1", "--nnodes", "2", "--master", f"127.0.0.1:{port}", "--max-restart", "1"]
    launchers = []
    for node in range(2):
        options = [*both, "--rank", str(node), "--log-dir", str(logs)]
        with open(tmp_path / f"machine-{node}.log", "wb") as file:
            command = [sys.executable, "-m", "paddlemix", "launch", str(RANK), str(job), *options]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            launchers.append(
                subprocess.Popen(
                    command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
                )
            )
    yield launchers
    for launcher in launchers:
        launcher.kill()
        launcher.wait()


def test_a_killed_rank_restarts_the_run_and_a_stop_saves_it(
    machines: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    end = time.monotonic() + HANG
    while not (tmp_path / "in-step").exists():
        assert machines[0].poll() is None and time.monotonic() < end, told_by(tmp_path, 0)
        time.sleep(0.05)
    machines[1].send_signal(signal.SIGTERM)
    # Until the first machine has heard of it; without this the step would be over sooner.
    while "SIGTERM" not in told_by(tmp_path, 0):
        assert machines[0].poll() is None and time.monotonic() < end, told_by(tmp_path, 0)
        time.sleep(0.05)
    (tmp_path / "go").touch()
    assert [machine.wait(timeout=HANG) for machine in machines] == [143, 143], told_by(tmp_path, 0)
    told, output_dir = told_by(tmp_path, 0), tmp_path / "out"
    # Rank 0's own error, a connection that was closed, follows from the kill and is not taken for the cause.
    assert re.findall(r"rank \d failed first.*", told)[0].startswith("rank 1 failed first")
    assert "killed (SIGKILL)" in told and "starting again (1 of at most 1)" in told
    assert "checkpoint-2" in told  # where it resumed
    # The stop is one of all: one checkpoint of one step, which is whole, and nothing half.
    folders = sorted(path.name for path in output_dir.iterdir() if "checkpoint-" in path.name)
    assert folders[-1] == "checkpoint-6" and not any(name.startswith(".") for name in folders)
    assert read_json(output_dir / "checkpoint-6" / "training_state.json")
    steps = [line["step"] for line in read_metrics(output_dir / "metrics.jsonl") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    logs = [(output_dir / "logs" / "ranks" / f"workerlog.{rank}").read_text() for rank in range(2)]
    starts = [re.findall(r"^===== \d{4}-.*", log, re.M) for log in logs]
    assert [len(lines) for lines in starts] == [2, 2] and starts[0][1].endswith("(start 2)")


def told_by(folder: Path, node: int) -> str:
    """What a machine's launcher has said."""
    return (folder / f"machine-{node}.log").read_text(encoding="utf-8", errors="replace")
