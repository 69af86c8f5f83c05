"""Kill -9 at any moment: the next start goes on from a whole checkpoint and ends with an undisturbed run's bits."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from paddlemix.checkpoints.files import read_safetensors
from paddlemix.checkpoints.load import load_pretrained
from paddlemix.trainer.saving import list_checkpoints
from tests.tiny_world import LORA, World, changed, reports, weights
from tests.trainer.fork_server import ForkServer, is_running, wait_for

RUN: dict[str, Any] = {
    "max_steps": 12,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "learning_rate": 0.01,
}
METHODS: dict[str, dict[str, Any]] = {"full": {}, "lora": LORA}
TEMPORARY = {"save": ".checkpoint-*", "result": ".result.*", "removal": ".checkpoint-*.old.*"}


@dataclass(frozen=True)
class Moment:
    """When a run is killed.

    Args:
        place: "step": after its first step; "start": when it is not yet known to train; "save", "removal", "result":
            while a directory of that temporary name is there.
        number: how many of them come before.
        delay: seconds from there on.
    """

    place: str
    number: int
    delay: float

    def kill(self, pid: int, output_dir: Path) -> None:
        """Waits for the moment and kills; nothing where the run was faster."""
        if self.place == "step":
            wait_for(pid, lambda: (output_dir / "metrics.jsonl").is_file())
        elif self.place in TEMPORARY:
            seen: set[Path] = set()

            def come() -> bool:
                there = set(output_dir.glob(TEMPORARY[self.place]))
                if self.place == "save":
                    there = {path for path in there if ".old." not in path.name}
                seen.update(there)
                return len(seen) > self.number and bool(there)

            wait_for(pid, come)
        time.sleep(self.delay)
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)


def moments(method: str) -> list[Moment]:
    """Ten moments: in the steps, in saving, while an old checkpoint is removed, while the result is written, before."""
    draw = random.Random(f"kill {method}")
    found = [Moment("step", 0, draw.uniform(0, 0.6)) for _ in range(4)]
    found += [Moment("save", draw.randrange(5), draw.uniform(0, 0.012)) for _ in range(3)]
    found += [Moment("removal", draw.randrange(3), 0.0), Moment("result", 0, draw.uniform(0, 0.01))]
    return [*found, Moment("start", 0, draw.uniform(0.1, 0.5))]


QUICK = (0, 4)  # of each method; the others are slow tests
CASES = [
    pytest.param(
        method,
        moment,
        id=f"{method}-{moment.place}-{number}",
        marks=() if number in QUICK else pytest.mark.slow,
    )
    for method in METHODS
    for number, moment in enumerate(moments(method))
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("logs"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def undisturbed(server: ForkServer, world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The output directory of a whole run of each method."""
    found = {}
    for method, values in METHODS.items():
        folder = tmp_path_factory.mktemp(method)
        status, log = server.run([str(world.recipe(folder, **RUN, **values))])
        assert status == 0, log
        found[method] = folder / "out"
    return found


def check_is_whole(output_dir: Path) -> None:
    """Every checkpoint that is there under its name can be read, each tensor of it, and says which step it is of."""
    for path in output_dir.glob("checkpoint-*"):
        assert path in list_checkpoints(output_dir)
        load_pretrained(path)
        for entry in read_safetensors(path / "optimizer.safetensors").values():
            assert entry.read().shape == entry.shape
    if (output_dir / "config.json").exists() or (output_dir / "lora_config.json").exists():
        load_pretrained(output_dir)


@pytest.mark.parametrize(("method", "moment"), CASES)
def test_a_killed_run_ends_with_the_same_bits(
    server: ForkServer, world: World, undisturbed: dict[str, Path], tmp_path: Path, method: str, moment: Moment
) -> None:
    out = tmp_path / "out"
    arguments = [str(world.recipe(tmp_path, **RUN, **METHODS[method]))]
    for _ in range(5):
        killed, log = server.run(arguments, lambda pid, moment=moment: moment.kill(pid, out))
        if killed == -signal.SIGKILL:
            break
        assert killed == 0, log  # the run was faster than the moment: again, with less delay
        shutil.rmtree(out)
        moment = replace(moment, delay=moment.delay / 2)
    assert killed == -signal.SIGKILL
    check_is_whole(out)
    before = [path.name for path in list_checkpoints(out)]
    status, log = server.run(arguments)
    assert status == 0, log
    if before:
        assert f"going on from {out / before[-1]}" in log
    assert not changed(weights(undisturbed[method]), weights(out))
    whole = undisturbed[method]
    assert reports(whole) == reports(out) and len(reports(out)) == RUN["max_steps"]
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-10", "checkpoint-12"]
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("out", "recipe.json")] == []


def test_killed_again_and_again(server: ForkServer, world: World, undisturbed: dict[str, Path], tmp_path: Path) -> None:
    """Each start makes some way, and the last one ends where one start would have."""
    out, arguments = tmp_path / "out", [str(world.recipe(tmp_path, **RUN, **LORA))]
    for number in range(2):
        status, _ = server.run(arguments, lambda pid: Moment("save", 1, 0.002).kill(pid, out))
        assert status == -signal.SIGKILL, number
        check_is_whole(out)
    status, log = server.run(arguments)
    assert status == 0, log
    assert not changed(weights(undisturbed["lora"]), weights(out))
