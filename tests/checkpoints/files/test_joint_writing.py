"""One directory written by several processes: which files one of them writes, and when it only takes part."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from paddlemix.checkpoints.files import directories, joint_writing
from paddlemix.checkpoints.files.finite import NotFiniteError
from paddlemix.checkpoints.files.joint_writing import DirectoryFiles, joint_directory, raise_alike, write_files
from paddlemix.checkpoints.files.shards import TensorFile
from paddlemix.checkpoints.files.tensors import TensorEntry
from paddlemix.errors import UserError
from paddlemix.parallel.layout import ALONE, Layout

FIRST_OF_TWO = Layout(world_size=2, rank=0, stage="stage1", sharding_group=SimpleNamespace(nranks=2, rank=0))
SECOND_COPY = Layout(world_size=3, rank=2, stage="stage1", sharding_group=SimpleNamespace(nranks=2, rank=0))


def zeros(name: str) -> np.ndarray:
    return np.zeros(2, np.float32)


def files(calls: list[str], reads: Callable[[str], np.ndarray] = zeros) -> DirectoryFiles:
    """Four files of two tensors each, which both processes have to gather together."""

    def entry(name: str) -> TensorEntry:
        def read() -> np.ndarray:
            calls.append(f"read {name}")
            return reads(name)

        return TensorEntry("F32", (2,), read, share=lambda: calls.append(f"share {name}"))

    return DirectoryFiles([TensorFile(f"{k}.safetensors", {n: entry(n) for n in (f"{k}a", f"{k}b")}) for k in range(4)])


def test_every_second_file_is_read_and_in_the_others_it_takes_part(tmp_path: Path) -> None:
    calls: list[str] = []
    digests = write_files(tmp_path, files(calls), FIRST_OF_TWO, lambda path: path.stat().st_size > 0)
    assert digests == {"0.safetensors": True, "2.safetensors": True}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors", "2.safetensors"]
    whole = [f"{'read' if k % 2 == 0 else 'share'} {k}{tensor}" for k in range(4) for tensor in "ab"]
    assert calls == whole


@pytest.mark.parametrize("fault", ["full", "infinite"])
def test_after_a_failure_it_only_takes_part(tmp_path: Path, fault: str) -> None:
    calls: list[str] = []

    def faulty(name: str) -> np.ndarray:
        if fault == "full":
            raise OSError(28, "No space left on device")
        return np.array([0, np.inf], np.float32)

    with pytest.raises(NotFiniteError if fault == "infinite" else UserError, match="'0a' holds|No space left"):
        write_files(tmp_path, files(calls, faulty), FIRST_OF_TWO)
    assert calls == ["read 0a"] + [f"share {k}{tensor}" for k in range(4) for tensor in "ab"][1:]


def test_a_second_copy_has_nothing_to_do(tmp_path: Path) -> None:
    calls: list[str] = []
    assert write_files(tmp_path, files(calls), SECOND_COPY) == {}
    assert not calls and not list(tmp_path.iterdir())


def test_other_processes_errors_name_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the gathering brings, also through pickle, as between processes."""

    def gathered(error: Exception | str | None) -> Callable[[object], list[object]]:
        return lambda own: [own, pickle.loads(pickle.dumps((error, None)))]

    monkeypatch.setattr(joint_writing, "gathered_objects", gathered("the disk is full"))
    with pytest.raises(UserError, match="^process 1: the disk is full$"):
        raise_alike(None)
    monkeypatch.setattr(joint_writing, "gathered_objects", gathered(NotFiniteError("'norm'", "NaN", 3)))
    with pytest.raises(NotFiniteError, match="^'norm' holds NaN .first at element 3") as caught:
        raise_alike(None)
    assert (caught.value.tensor, caught.value.found) == ("'norm'", "NaN")
    monkeypatch.setattr(joint_writing, "gathered_objects", gathered(None))
    assert raise_alike(None, "mine") == ["mine", None]


def test_a_folder_that_is_seen_later_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system shows it once the folder above is listed again."""
    late = tmp_path / "late"
    monkeypatch.setattr(directories.os, "listdir", lambda folder: late.mkdir(exist_ok=True))
    with joint_directory(contextlib.nullcontext(late), ALONE) as directory:
        assert directory == late and late.is_dir()


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directories, "_PATIENCE", 0.0)
    said = "which process 0 has made, does not exist on .* file system that they share"
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(UserError, match=said), joint_directory(contextlib.nullcontext(elsewhere), ALONE):
        raise AssertionError("nothing may be written")
