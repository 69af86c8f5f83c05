"""Kill -9 at any moment: the next start goes on from a whole checkpoint and ends with an undisturbed run's bits."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paddlemix.checkpoints.files.weight_files import read_safetensors
from paddlemix.checkpoints.load import load_pretrained
from paddlemix.trainer.resuming.checkpoint_folders import list_checkpoints
from tests.moments import Moment
from tests.tiny_world import LORA, World, changed, reports, weights
from tests.trainer.fork_server import ForkServer

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
SAVING = "[!r]* */out/.checkpoint-[0-9]*"  # whatever is done to one that is written, but reading
SAVES = 5 * 9  # of its touches at the least: five checkpoints of nine files and more
STARTS = ("read */config.json", "read */model.safetensors", "read */train.json", "mkdir */out")


def moments(method: str) -> list[Moment]:
    """Ten moments: in the steps, in saving, while an old checkpoint is removed, while the result is written, before."""
    draw = random.Random(f"kill {method}")
    found = [Moment("open */out/metrics.jsonl", 1 + number) for number in draw.sample(range(11), 4)]
    found += [Moment(SAVING, round(draw.random() * 0.9 * SAVES), torn=draw.random() < 0.5) for _ in range(3)]
    found += [
        Moment("* */out/.checkpoint-*.old.*", draw.randrange(10)),
        Moment("* */out/.result.*", draw.randrange(10)),
    ]
    return [*found, Moment(draw.choice(STARTS))]


QUICK = (0, 4)  # of each method; the others are slow tests
CASES = [
    pytest.param(
        method,
        moment,
        id=f"{method}-{number}",
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
    killed, log = server.run(arguments, moment)
    assert killed == -signal.SIGKILL, log
    check_is_whole(out)
    before = [path.name for path in list_checkpoints(out)]
    status, log = server.run(arguments)
    assert status == 0, log
    if before:
        assert f"resuming from {out / before[-1]}" in log
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
        status, _ = server.run(arguments, Moment("sync */out/.checkpoint-*/*model.safetensors", 3, torn=True))
        assert status == -signal.SIGKILL, number
        check_is_whole(out)
    status, log = server.run(arguments)
    assert status == 0, log
    assert not changed(weights(undisturbed["lora"]), weights(out))
