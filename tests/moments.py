"""Ends or interrupts a process at a marked place of its own work: at its n-th touch of the files that a pattern names.

So no test depends on how fast a machine is: the process itself sends the signal, exactly there. As a command it runs a
script or a module in that way,

    python -m tests.moments MOMENT.json SCRIPT.py|MODULE [ARGUMENTS]

Touches are what an audit hook sees of files, and what the disk is asked for:

    read PATH, open PATH      before it is opened, for reading or for writing
    rename PATH               before something takes that name
    remove, mkdir, rmdir PATH before it is done
    write PATH                before bytes go to an open file by `os.write`
    sync PATH                 before an open file's content is flushed to the disk
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

_TARGETS = {"os.rename": ("rename", 1), "os.remove": ("remove", 0), "os.mkdir": ("mkdir", 0), "os.rmdir": ("rmdir", 0)}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True)
class Moment:
    """When a process sends itself a signal.

    Args:
        touch: pattern of touches, e.g. "sync */out/.checkpoint-*"; compared with the whole text.
        number: how many touches that match come before.
        torn: half of what the touch is about has reached the file: for "write" and "sync".
        signal: which.
        to_group: to its whole process group, as a terminal does.
    """

    touch: str
    number: int = 0
    torn: bool = False
    signal: int = signal.SIGKILL
    to_group: bool = False


def watch(moment: Moment | None, record: Path | None = None) -> None:
    """From now on this process sends itself the moment's signal when it comes.

    Args:
        record: a file that takes all touches below its folder, one a line, for who wants to choose a moment.
    """
    count = 0
    notes = None if record is None else os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    original_write, original_sync = os.write, os.fsync

    def note(touch: str) -> bool:
        """Whether the moment has come."""
        nonlocal count
        if notes is not None:
            original_write(notes, touch.encode("utf-8", "backslashreplace") + b"\n")
        if moment is None or not fnmatchcase(touch, moment.touch):
            return False
        count += 1
        return count == moment.number + 1

    def see(event: str, arguments: tuple[Any, ...]) -> None:
        touch = _touch(event, arguments)
        if touch is not None and note(touch):
            _send(moment)

    def write(descriptor: int, data: Any) -> int:
        if _is_file(descriptor) and note(f"write {_path_of(descriptor)}"):
            assert moment is not None
            if moment.torn:
                original_write(descriptor, memoryview(data)[: len(data) // 2])
            _send(moment)
        return original_write(descriptor, data)

    def sync(descriptor: int) -> None:
        if note(f"sync {_path_of(descriptor)}"):
            assert moment is not None
            if moment.torn and _is_file(descriptor):
                os.truncate(_path_of(descriptor), os.fstat(descriptor).st_size // 2)
            _send(moment)
        original_sync(descriptor)

    os.write, os.fsync = write, sync
    sys.addaudithook(see)


def _touch(event: str, arguments: tuple[Any, ...]) -> str | None:
    """The text of an audit event; None for one that is about no file."""
    if event == "open":
        path, _, flags = arguments
        kind, folder = "open" if flags & _WRITING else "read", -1
    elif event in _TARGETS:
        kind, place = _TARGETS[event]
        path, folder = arguments[place], arguments[-1]
    else:
        return None
    if not isinstance(path, (str, bytes, os.PathLike)):
        return None
    text = os.fsdecode(path)
    if isinstance(folder, int) and folder >= 0 and not os.path.isabs(text):
        text = os.path.join(_path_of(folder), text)
    return f"{kind} {os.path.abspath(text)}"


def _path_of(descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


def _is_file(descriptor: int) -> bool:
    return os.path.isfile(f"/proc/self/fd/{descriptor}")


def _send(moment: Moment | None) -> None:
    assert moment is not None
    if moment.to_group:
        os.killpg(os.getpgid(0), moment.signal)
    else:
        os.kill(os.getpid(), moment.signal)


def command(folder: Path, moment: Moment, *arguments: str) -> list[str]:
    """What to start for a script or module that gets its signal at a moment; writes a small file into `folder`."""
    path = folder / "moment.json"
    path.write_text(json.dumps(asdict(moment)), encoding="utf-8")
    return [sys.executable, "-m", "tests.moments", str(path), *arguments]


# What a process started from a terminal has; a script's background job inherits ignored ones.
_DISPOSITIONS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
_KEPT = (signal.SIGHUP, signal.SIGQUIT)  # ignored ones end no test run, but its children have the system's own


@contextlib.contextmanager
def signals_of_a_terminal() -> Iterator[None]:
    """Signals do in this process, and in those that it starts, what they do in one started from a terminal."""
    before = {number: signal.getsignal(number) for number in (*_DISPOSITIONS, *_KEPT)}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, before)
    for number, disposition in _DISPOSITIONS.items():
        signal.signal(number, disposition)
    for number in _KEPT:
        if before[number] == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    try:
        yield
    finally:
        for number, disposition in before.items():
            signal.signal(number, disposition)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _main(moment: str, target: str, *arguments: str) -> None:
    sys.argv[:] = [target, *arguments]
    watch(Moment(**json.loads(Path(moment).read_text(encoding="utf-8"))))
    if target.endswith(".py"):
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
