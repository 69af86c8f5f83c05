"""Locks and temporary names: a second writer is told who has it, and only what nobody holds is removed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from paddlemix import file_locks, locks
from paddlemix.errors import UserError
from paddlemix.file_locks import LockingUnavailableError
from paddlemix.locks import Locked, locked_output
from paddlemix.temporary import LOCK_FILE, remove_leftovers, temporary_directory
from tests.forked import kill


def test_a_second_writer_is_told_who_has_the_folder(tmp_path: Path, child: Callable[..., int]) -> None:
    out = tmp_path / "a" / "out"

    def write(ready: Callable[[], None]) -> None:
        with locked_output(out, "output_dir"):
            ready()

    pid = child(write)
    with (
        pytest.raises(UserError, match=f"output_dir '{out}' is being written by process {pid}; wait for it"),
        locked_output(tmp_path / "a" / "x" / ".." / "out", "output_dir"),
    ):
        pass
    kill(pid)
    with locked_output(out, "output_dir"):  # what a killed process held is free
        assert (out / LOCK_FILE).exists()
    assert not (out / LOCK_FILE).exists()


def test_a_folder_into_which_nothing_came_is_gone_again(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked_output(tmp_path / "a" / "b", "output_dir"):
        raise KeyError
    assert not (tmp_path / "a").exists()
    with locked_output(tmp_path / "a" / "b", "output_dir"):
        (tmp_path / "a" / "b" / "file").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]


def test_what_appears_in_one_step_is_locked_beside(tmp_path: Path) -> None:
    with locked_output(tmp_path / "out", "--output", inside=False):
        assert not (tmp_path / "out").exists()
        with (
            pytest.raises(UserError, match="--output '.*out' is being written by process"),
            locked_output(tmp_path / "out", "--output", inside=False),
        ):
            pass
        with locked_output(tmp_path / "other", "--output", inside=False):
            pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_was_removed_meanwhile_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, hold = tmp_path / "lock", locks.lock_file

    def remove_then_hold(descriptor: int, place: Path, wait: bool) -> bool:
        monkeypatch.setattr(locks, "lock_file", hold)
        path.unlink()
        return hold(descriptor, place, wait)

    monkeypatch.setattr(locks, "lock_file", remove_then_hold)
    lock = Locked(path, "it", lambda _: "busy")
    with pytest.raises(UserError, match="busy"):
        Locked(path, "it", lambda _: "busy")
    lock.close()
    Locked(path, "it", lambda _: "busy").close()


def test_forked_processes_do_not_keep_a_lock(tmp_path: Path, child: Callable[..., int]) -> None:
    """The workers that read data outlive a killed run for a moment; its next start must not meet its lock."""
    lock = Locked(tmp_path / "lock", "it", lambda _: "busy")
    child(lambda ready: ready())
    lock.close()
    Locked(tmp_path / "lock", "it", lambda _: "busy").close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("fails", ["open", "write", "fsync", "mkdir"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_full_or_closed_disk_is_an_error_for_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, code: int, inside: bool
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, fails, fail)
        reason = f"{os.strerror(code)}; free space or choose another place"
        lock = "" if fails == "mkdir" else rf" \(its lock, {LOCK_FILE if inside else f'.out{LOCK_FILE}'}\)"
        with (
            pytest.raises(UserError, match=f"^cannot write --output '{tmp_path}/deep/out'{lock}: {reason}$"),
            locked_output(tmp_path / "deep" / "out", "--output", inside),
        ):
            raise AssertionError
    assert not list(tmp_path.iterdir())


def test_a_value_is_replaced_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, child: Callable[..., int]
) -> None:
    path = tmp_path / "lock"
    lock = Locked(path, "it", lambda _: "busy")
    lock.write({"old": 1})

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for fails in ("write", "fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot write it: No space left"):
            patch.setattr(os, fails, fail)
            lock.write({"new": "x" * 5000})
        assert lock.read() == {"old": 1} == json.loads(path.read_text())
    lock.write({"new": 2})
    assert lock.read() == {"new": 2} == json.loads(path.read_text())
    with pytest.raises(UserError, match="busy"):
        Locked(path, "it", lambda _: "busy")
    lock.close()
    assert [place.name for place in tmp_path.iterdir()] == ["lock"]


def test_a_lock_without_a_value_leaves_no_file(tmp_path: Path) -> None:
    lock = Locked(tmp_path / "lock", "it", lambda _: "busy")
    with pytest.raises(UserError, match="busy"):
        Locked(tmp_path / "lock", "it", lambda _: "busy")
    assert (tmp_path / "lock").exists()
    lock.close()
    assert not list(tmp_path.iterdir())


def test_without_locks_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As directories on NFS: who writes cannot be told."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr("fcntl.flock", refuse)
    with temporary_directory(tmp_path, "model") as directory:
        assert remove_leftovers(tmp_path) == [] and directory.exists()
    with locked_output(tmp_path, "output_dir"):
        assert f"has no locks (Bad file descriptor): start nothing else that writes {tmp_path}" in caplog.text
    with pytest.raises(LockingUnavailableError):
        Locked(tmp_path / "lock", "it", lambda _: "busy")
    assert not (tmp_path / LOCK_FILE).exists()


@pytest.mark.parametrize("missing", ["locks", "the folder"])
def test_what_cannot_be_locked_is_done_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if missing == "locks":
        monkeypatch.setattr(fcntl, "flock", flock)
    before = set(file_locks._open)
    with file_locks.one_at_a_time(tmp_path / ("" if missing == "locks" else "none") / "a.lock"):
        pass
    assert set(file_locks._open) == before
