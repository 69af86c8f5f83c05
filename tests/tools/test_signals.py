"""SIGTERM and Ctrl-C as a cluster and a terminal send them: to the command's process and to its whole group."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paddlemix.trainer.recipe import run_recipe
from paddlemix.trainer.saving import list_checkpoints
from tests.conftest import ROOT
from tests.tiny_world import World, changed, reports, weights
from tests.trainer.fork_server import ForkServer, wait_for

RUN: dict[str, Any] = {"max_steps": 60, "save_strategy": "no", "per_device_train_batch_size": 1}


@pytest.fixture(scope="module")
def undisturbed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of the whole run."""
    directory = tmp_path_factory.mktemp("whole") / "out"
    run_recipe(world.config(directory, **RUN))
    return directory


@pytest.mark.parametrize(
    ("number", "to_group", "status"), [(signal.SIGTERM, False, 143), (signal.SIGINT, True, 130)], ids=["TERM", "INT"]
)
def test_the_command_saves_ends_in_order_and_goes_on(
    world: World, undisturbed: Path, tmp_path: Path, number: signal.Signals, to_group: bool, status: int
) -> None:
    """With a data worker, which a terminal's Ctrl-C reaches too."""
    out, recipe = tmp_path / "out", world.recipe(tmp_path, dataloader_num_workers=1, **RUN)
    command = [sys.executable, str(ROOT / "paddlemix/tools/supervised_finetune.py"), str(recipe)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert wait_for(process.pid, lambda: (out / "metrics.jsonl").is_file()), process.communicate()[1]
    (os.killpg if to_group else os.kill)(process.pid, number)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == status, stderr
    assert f"{number.name}: saving after this step, then ending" in stderr
    assert "Traceback" not in stderr and stdout == ""
    [checkpoint] = list_checkpoints(out)
    assert not (out / "config.json").exists() and not list(out.glob(".*"))
    assert sorted(reports(out))[-1] == int(checkpoint.name.partition("-")[2]) < RUN["max_steps"]
    run_recipe(world.config(out, **RUN))
    assert not changed(weights(undisturbed), weights(out))
    assert reports(undisturbed) == reports(out)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path)
    yield server
    server.close()


def test_before_the_first_step_nothing_is_left(server: ForkServer, world: World, tmp_path: Path) -> None:
    def interrupt(number: int) -> Any:
        def send(pid: int) -> None:
            time.sleep(0.15)
            os.kill(pid, number)

        return send

    arguments = [str(world.recipe(tmp_path / "run", **RUN))]
    status, log = server.run(arguments, interrupt(signal.SIGINT))
    assert status == 130 and log.endswith("interrupted\n") and "Traceback" not in log
    status, log = server.run(arguments, interrupt(signal.SIGTERM))
    assert status == -signal.SIGTERM and "Traceback" not in log
    assert not (tmp_path / "run" / "out").exists()
