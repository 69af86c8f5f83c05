"""What a killed command left under a hidden name goes with the next command there; what is being written stays."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from paddlemix.checkpoints.files import directories
from paddlemix.locks import locked_output
from paddlemix.temporary import remove_leftovers, temporary_directory
from paddlemix.tools import convert_checkpoint, merge_lora_params, quantize
from paddlemix.tools.common.command import run_command
from tests.tiny_world import World


def leave_behind(folder: Path) -> None:
    """What kill -9 of a command that writes into a folder leaves there."""
    folder.mkdir(exist_ok=True)
    pid = os.fork()
    if not pid:
        with locked_output(folder / "old", "--output", inside=False), temporary_directory(folder, "old") as path:
            (path / "model.safetensors").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("command", ["convert", "quantize", "merge-lora"])
def test_the_next_command_cleans(
    world: World, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    out = tmp_path / "out"
    leave_behind(out if command == "merge-lora" else tmp_path)
    held: list[Path] = []
    real = directories._sync if command != "merge-lora" else merge_lora_params._write_and_compare

    def look(*arguments: Any) -> Any:
        """Another command that cleans in the midst of this one."""
        place = out if command == "merge-lora" else tmp_path
        assert remove_leftovers(place) == []
        held.extend(path for path in place.iterdir() if path.name.startswith("."))
        return real(*arguments)

    if command == "merge-lora":
        monkeypatch.setattr(merge_lora_params, "_write_and_compare", look)
    else:
        monkeypatch.setattr(directories, "_sync", look)
    main, arguments = {
        "convert": (convert_checkpoint.main, ["--input", world.model, "--output", out, "--to", "paddlemix"]),
        "quantize": (quantize.main, ["--model-path", world.model, "--output", out, "--kind", "int8"]),
        "merge-lora": (merge_lora_params.main, ["--lora_path", adapter, "--merge_model_path", out]),
    }[command]
    assert run_command(main, [str(argument) for argument in arguments]) == 0
    assert held and not list(out.glob(".*")) and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("command", ["convert", "quantize", "merge-lora"])
def test_two_at_once_are_not_mixed(
    world: World, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    out = tmp_path / "out"
    main, arguments = {
        "convert": (convert_checkpoint.main, ["--input", world.model, "--output", out, "--to", "paddlemix"]),
        "quantize": (quantize.main, ["--model-path", world.model, "--output", out, "--kind", "int8"]),
        "merge-lora": (merge_lora_params.main, ["--lora_path", adapter, "--merge_model_path", out]),
    }[command]
    with locked_output(out, "--output", inside=command == "merge-lora"):
        assert run_command(main, [str(argument) for argument in arguments]) == 2
    assert f"out' is being written by process {os.getpid()}; wait for it" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
