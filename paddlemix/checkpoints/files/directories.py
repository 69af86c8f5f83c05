"""Directories that appear whole or not at all, and write errors that a user can act on.  Knows no file format."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from paddlemix.locks import write_errors
from paddlemix.temporary import remove_leftovers, temporary_directory, umask

_PATIENCE = 5.0  # seconds in which a network file system shows what another machine has written


def writing(path: Path) -> contextlib.AbstractContextManager[None]:
    """Turns a failed write (full disk, no permission) into a UserError that names the path."""
    return write_errors(f"'{path}'")


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yields a temporary directory that becomes `target` when the block succeeds and is removed when it does not.

    Args:
        target: replaced whole if it exists.

    Raises:
        UserError: the disk is full or cannot be written; what was there before is untouched.
    """
    # the block may change the working directory
    target = Path(os.path.abspath(target))
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent)
        with temporary_directory(target.parent, target.name) as temporary:
            yield temporary
            # mkdtemp makes private directories; a result gets the permissions that mkdir would give it
            os.chmod(temporary, 0o777 & ~umask())
            # Everything is on the disk before the name is: after a power cut there is the old directory or the new one,
            # never a new name over empty files.
            for path in temporary.rglob("*"):
                _sync(path)
            _sync(temporary)
            if target.exists():  # rename replaces no directory that has files
                _exchange(temporary, target)
            else:
                os.rename(temporary, target)
            _sync(target.parent)  # the rename itself


def remove_directory(path: Path) -> None:
    """Removes a directory; if that is interrupted, what is left has a hidden name, which no reader looks for.

    Raises:
        UserError: it cannot be removed.
    """
    with writing(path), temporary_directory(path.parent, f"{path.name}.old") as hidden:
        os.rename(path, hidden / path.name)
        shutil.rmtree(hidden)


def is_seen(path: Path) -> bool:
    """Whether this machine sees a file or directory that another one has made; a missing one is waited for."""
    end = time.monotonic() + _PATIENCE
    while not path.exists():
        if time.monotonic() > end:
            return False
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # makes a network file system look again
        time.sleep(0.1)
    return True


def _exchange(temporary: Path, target: Path) -> None:
    """Moves `temporary` to `target`; a failed step is undone."""
    with temporary_directory(target.parent, target.name, replaced=True) as old:
        moves = [(target, old / target.name), (temporary, target)]
        done: list[tuple[Path, Path]] = []
        try:
            for source, place in moves:
                os.rename(source, place)
                done.append((source, place))
        except BaseException:  # a keyboard interrupt too: `target` must not be left missing
            for source, place in reversed(done):
                os.rename(place, source)
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
