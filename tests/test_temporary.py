"""What killed processes leave under temporary names goes; what somebody still writes stays."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paddlemix import temporary
from paddlemix.locks import locked_output
from paddlemix.temporary import remove_leftovers, temporary_directory, temporary_file
from tests.forked import kill


def test_a_folder_that_is_taken_for_a_leftover_before_it_is_held_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = tempfile.mkdtemp

    def make_and_lose(**options: Any) -> str:
        monkeypatch.setattr(tempfile, "mkdtemp", make)
        path = make(**options)
        assert remove_leftovers(tmp_path) == [Path(path)]
        return path

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_lose)
    with temporary_directory(tmp_path, "model") as folder:
        assert folder.is_dir() and not remove_leftovers(tmp_path)


def test_leftovers_of_killed_processes_go_and_what_is_written_stays(tmp_path: Path, child: Callable[..., int]) -> None:
    def write(ready: Callable[[], None]) -> None:
        with (
            locked_output(tmp_path / "model", "--output", inside=False),
            temporary_directory(tmp_path, "model") as directory,
            temporary_file(tmp_path / "data.json") as file,
        ):
            (directory / "weights").write_text("half")
            file.write_text("half")
            ready()

    pid = child(write)
    mine = [tmp_path / name for name in (".model.abcdefgh", ".cache", "model")]
    for path in mine:
        path.mkdir()
    assert remove_leftovers(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == len(mine) + 3
    kill(pid)
    assert len(remove_leftovers(tmp_path)) == 3
    assert sorted(tmp_path.iterdir()) == sorted(mine)
    assert remove_leftovers(tmp_path / "missing") == []


def test_what_was_being_replaced_comes_back(tmp_path: Path, child: Callable[..., int]) -> None:
    """Between its two renames a replacement has the old folder under a hidden name alone."""

    def replace(ready: Callable[[], None]) -> None:
        with temporary_directory(tmp_path, "model", replaced=True) as old:
            os.rename(tmp_path / "model", old / "model")
            ready()

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")
    kill(child(replace))
    assert not (tmp_path / "model").exists()
    assert len(remove_leftovers(tmp_path)) == 1
    assert (tmp_path / "model" / "weights").read_text() == "old"
    kill(child(replace))
    (tmp_path / "model").mkdir()  # the new one has come
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and not list((tmp_path / "model").iterdir())


def test_a_failed_step_back_keeps_the_only_copy(tmp_path: Path) -> None:
    with pytest.raises(OSError), temporary_directory(tmp_path, "model", replaced=True) as old:
        (old / "model").mkdir()
        raise OSError
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_umask_is_read_without_being_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system lists it, no other thread can see another value; elsewhere it is set and put back."""
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "umask", lambda mask: pytest.fail("the umask was set"))
            assert temporary.umask() == 0o027
        monkeypatch.setattr("builtins.open", unreadable)
        assert temporary.umask() == 0o027
    finally:
        assert os.umask(before) == 0o027


def unreadable(*_: object, **__: object) -> None:
    raise FileNotFoundError
