"""SIGTERM and Ctrl-C as a cluster and a terminal send them: to the command's process and to its whole group."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paddlemix.trainer.recipe import run_recipe
from paddlemix.trainer.resuming.checkpoint_folders import list_checkpoints
from tests import moments
from tests.conftest import ROOT
from tests.moments import Moment
from tests.tiny_world import World, changed, reports, weights
from tests.trainer.fork_server import ForkServer

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
    moment = Moment("open */out/metrics.jsonl", 3, signal=number, to_group=to_group)
    command = moments.command(tmp_path, moment, str(ROOT / "paddlemix/tools/supervised_finetune.py"), str(recipe))
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, start_new_session=True)
    assert process.returncode == status, process.stderr
    assert f"{number.name}: saving after this step, then ending" in process.stderr
    assert "Traceback" not in process.stderr and process.stdout == ""
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
    arguments = [str(world.recipe(tmp_path / "run", **RUN))]
    for touch in ("read */recipe.json", "read */model.safetensors", "read */train.json", "mkdir */run/out"):
        status, log = server.run(arguments, Moment(touch, signal=signal.SIGINT))
        assert status == 130 and log.endswith("interrupted\n") and "Traceback" not in log
        status, log = server.run(arguments, Moment(touch, signal=signal.SIGTERM))
        assert status == -signal.SIGTERM and "Traceback" not in log
    assert not (tmp_path / "run" / "out").exists()
