"""A write that fails: at any file, nothing that was whole before is lost, nothing half stays, and the user is told."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from paddlemix.errors import UserError
from paddlemix.tools import supervised_finetune
from paddlemix.tools.common.command import run_command
from paddlemix.trainer.recipe import run_recipe
from paddlemix.trainer.resuming.checkpoint_folders import list_checkpoints
from tests.tiny_world import LORA, World, changed, weights
from tests.trainer.fork_server import ForkServer

EVERY = {"save_strategy": "steps", "save_steps": 2}
FULL_DEVICE = Path("/dev/full")  # every write to it fails: no space left
SHARED_FILES = ("processor_config.json", "tokenizer.model", "optimizer.safetensors", "trainer_state.json")
FILES = [
    *(("full", name) for name in ("config.json", "model.safetensors", *SHARED_FILES, "training_state.json.tmp")),
    *(("lora", name) for name in ("adapter_model.safetensors", "lora_config.json.tmp")),
]


def fill_disk(monkeypatch: pytest.MonkeyPatch, pattern: str) -> list[str]:
    """Whoever writes to a path that matches gets a full disk; the names that were written to come back."""
    if not FULL_DEVICE.exists():
        pytest.skip("this system has no /dev/full")
    original, met = builtins.open, []

    def open_or_fail(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if isinstance(file, (str, os.PathLike)) and set(mode) & set("wax+") and fnmatch(os.fspath(file), pattern):
            met.append(Path(file).name)
            Path(file).touch()  # a full disk still takes names
            file = FULL_DEVICE
        return original(file, mode, *arguments, **named)

    monkeypatch.setattr(builtins, "open", open_or_fail)
    monkeypatch.setattr(io, "open", open_or_fail)
    return met


@pytest.fixture(scope="module")
def started(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Output directories of runs that ended at step 2, with a checkpoint there; only to be copied."""
    found = {}
    for method, values in (("full", {}), ("lora", LORA)):
        found[method] = tmp_path_factory.mktemp(method) / "out"
        run_recipe(world.config(found[method], **{**EVERY, "max_steps": 2}, **values))
    return found


@pytest.mark.parametrize(("method", "name"), FILES)
def test_a_full_disk_at_any_file_of_a_checkpoint(
    world: World,
    started: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: str,
    name: str,
) -> None:
    checkpoint = tmp_path / "out" / "checkpoint-2"
    copy_tree(started[method] / "checkpoint-2", checkpoint)
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    assert name.removesuffix(".tmp") in files
    met = fill_disk(monkeypatch, f"*/.checkpoint-4.*/{name.removesuffix('.tmp')}*")
    values = {**EVERY, "save_total_limit": 1, **(LORA if method == "lora" else {})}
    status = run_command(supervised_finetune.main, [str(world.recipe(tmp_path, **values))])
    error = capsys.readouterr().err.partition("error: ")[2]
    assert (status, met) == (2, [name if name in met else f"{name}.tmp"])
    assert error.startswith("checkpoint-4 was not saved: cannot write '") and error.count("\n") == 1
    assert "No space left on device; free space or choose another place" in error
    assert "checkpoint-2 is untouched: the same command resumes from there" in error
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == files
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "checkpoint-2",
        "metrics.jsonl",
        "run_config.json",
        "started_by.json",
    ]


def copy_tree(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def test_after_space_was_freed_the_run_goes_on(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_recipe(world.config(tmp_path / "whole", **EVERY))
    config = world.config(tmp_path / "out", **EVERY)
    met = fill_disk(monkeypatch, "*/.checkpoint-4.*/optimizer.safetensors")
    with pytest.raises(UserError, match="checkpoint-4 was not saved"):
        run_recipe(config)
    assert met
    monkeypatch.undo()
    run_recipe(config)
    assert not changed(weights(tmp_path / "whole"), weights(tmp_path / "out"))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*/out/metrics.jsonl", "metrics.jsonl cannot be written: No space left on device; free some space"),
        ("*/out/.run_config.json.*", "run_config.json: No space left on device"),
        ("*/out/.result.*/model.safetensors", "cannot write '.*model.safetensors': No space left on device"),
        ("*/.checkpoint-2.*/config.json*", "There is no earlier checkpoint: the run has to start over"),
    ],
)
def test_a_full_disk_elsewhere(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, message: str
) -> None:
    fill_disk(monkeypatch, pattern)
    with pytest.raises(UserError, match=message):
        run_recipe(world.config(tmp_path / "out", **EVERY))
    assert not list((tmp_path / "out").glob(".*"))
    assert not (tmp_path / "out" / "config.json").exists()
    monkeypatch.undo()
    assert run_recipe(world.config(tmp_path / "out", **EVERY))["steps"] == 4


def test_a_curve_that_cannot_be_drawn_costs_no_model(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(monkeypatch, "*loss.png*")
    run_recipe(world.config(tmp_path / "out"))
    assert (tmp_path / "out" / "config.json").is_file()
    assert not list((tmp_path / "out").glob("*loss.png*"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ForkServer]:
    (tmp_path / "logs").mkdir()
    server = ForkServer(tmp_path / "logs")
    yield server
    server.close()


def test_files_that_may_not_grow_end_the_command_with_status_2(
    server: ForkServer, world: World, started: dict[str, Path], tmp_path: Path
) -> None:
    """A limit of the system, in a process of its own: the first bytes of a file are written, then it fails."""
    checkpoint = tmp_path / "out" / "checkpoint-2"
    copy_tree(started["full"] / "checkpoint-2", checkpoint)
    limit = (checkpoint / "model.safetensors").stat().st_size - 1000
    status, log = server.run([str(world.recipe(tmp_path, **EVERY))], limit=limit)
    assert status == 2, log
    assert "error: checkpoint-4 was not saved: cannot write '" in log and "File too large" in log
    assert "checkpoint-2 is untouched" in log and "Traceback" not in log
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    assert not list((tmp_path / "out").glob(".*"))
    status, log = server.run([str(world.recipe(tmp_path, **EVERY))])
    assert status == 0 and f"resuming from {checkpoint}" in log
