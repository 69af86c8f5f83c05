"""Who is currently writing what: one lock per output.

A lock ends with the process that holds it (`file_locks.py`), so a killed command blocks nobody.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from paddlemix.errors import UserError
from paddlemix.file_locks import LockingUnavailableError, close_file, is_at, lock_file, remember
from paddlemix.temporary import LOCK_FILE, NAME_LENGTH, new_temporary_file


class Locked:
    """A small JSON file that only this process may write until it closes it or ends; removed if it is closed without
    a value.

    Args:
        path: created if missing.
        what: the output that it belongs to and what it is of that, for messages of writes that fail.
        busy: the message if another process has it, from the file's value (None if it has none).
        wait: whether to wait until it is free.

    Raises:
        UserError: another process has it.
        LockingUnavailableError: the file system cannot lock.
        UserError: the file cannot be made.
    """

    def __init__(self, path: Path, what: str, busy: Callable[[Any], str], wait: bool = False) -> None:
        self.path, self._what = path, what
        with write_errors(what):
            self._take(busy, wait)

    def close(self) -> None:
        """Lets others have it."""
        self._release()

    def _hold(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._release = weakref.finalize(self, _release, descriptor, self.path, os.getpid())

    def _take(self, busy: Callable[[Any], str], wait: bool) -> None:
        path = self.path
        while True:
            # Open first, lock second: between the two the holder may finish and remove the file.  What this process
            # then locks is a file that has no name any more, which excludes nobody; `is_at` sees that, and the loop
            # takes the new one.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            remember(descriptor)
            self._hold(descriptor)
            try:
                if not lock_file(descriptor, path, wait):
                    raise UserError(busy(self.read()))
            except BaseException:
                # The lock is another process's: its file must stay.
                self._release.detach()  # it may be another process's, empty for a moment
                close_file(descriptor, os.getpid())
                raise
            # The file may have been removed and made anew between open and lock.
            if is_at(descriptor, path):
                return
            self.close()  # who had it has removed it meanwhile

    def read(self) -> Any:
        """Its value; None where it is empty or half written."""
        try:
            return json.loads(os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0))
        except (ValueError, RecursionError):
            return None

    def write(self, value: Any) -> None:
        """Replaces its value in one step; it is on the disk when this returns.

        Raises:
            UserError: it cannot be written, e.g. because the disk is full; it has the value that it had.
        """
        data = memoryview((json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode())
        with write_errors(self._what):
            descriptor, temporary = new_temporary_file(self.path)
            try:
                while data:
                    data = data[os.write(descriptor, data) :]
                # The data must be on the disk before the name points to it: after a power loss the file has the old
                # value or the new one, never an empty one.
                os.fsync(descriptor)
                os.replace(temporary, self.path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                close_file(descriptor, os.getpid())
                raise
        self.close()  # of the file that was there; the new one is held already
        self._hold(descriptor)


@contextlib.contextmanager
def write_errors(what: str) -> Iterator[None]:
    """Turns a failed write (full disk, no permission) into a UserError that names `what`."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {what}: {reason}; free space or choose another place") from error


@contextlib.contextmanager
def locked_output(path: Path, what: str, inside: bool = True) -> Iterator[None]:
    """Keeps every other command from writing the same output while the block runs.

    Args:
        path: the folder, created if missing and removed again if nothing is written into it; or, if not `inside`, any
            path: the lock is then beside it, for outputs that appear in one step.
        what: the flag or key that names it, for messages.

    Raises:
        UserError: another process writes it (names the process), or no lock can be made there.
    """
    path = Path(os.path.realpath(path))
    folder = path if inside else path.parent
    place = folder / LOCK_FILE if inside else folder / f".{path.name[:NAME_LENGTH]}{LOCK_FILE}"
    with contextlib.ExitStack() as stack:
        with write_errors(f"{what} '{path}'"):
            stack.enter_context(made_folder(folder))
        try:
            lock = Locked(
                place,
                f"{what} '{path}' (its lock, {place.name})",
                lambda value: f"{what} '{path}' is being written by {_writer(value)}; wait for it, or choose another",
            )
        # Some network file systems lock nothing.  Refusing to run there would help nobody, so the user is warned
        # instead.
        except LockingUnavailableError as error:
            _remove(place.unlink)
            logging.getLogger("paddlemix").warning("%s: start nothing else that writes %s", error, path)
            yield
            return
        # An exit stack runs these in reverse: the file is removed first and unlocked second.  The other way round, a
        # process that got the lock in between would have its file removed.
        stack.callback(lock.close)
        stack.callback(_remove, place.unlink)  # while it is held
        # For the message of whoever comes second.
        lock.write({"pid": os.getpid(), "host": socket.gethostname()})
        yield


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Makes a folder and its parents; new ones that are still empty when the block ends are removed again."""
    # Only folders that this call makes may be removed again; an empty one that the user made stays.
    made = [missing for missing in (folder, *folder.parents) if not os.path.exists(missing)]
    with contextlib.ExitStack() as stack:
        for directory in reversed(made):
            stack.callback(_remove, directory.rmdir)  # which fails where something is in it
        folder.mkdir(parents=True, exist_ok=True)
        yield


def _remove(remove: Callable[[], None]) -> None:
    """Calls `remove`; a failure is ignored, since it must not hide another error."""
    with contextlib.suppress(OSError):
        remove()


def _writer(value: Any) -> str:
    if not isinstance(value, dict) or "pid" not in value:
        return "another process"
    here = value.get("host") == socket.gethostname()
    return f"process {value['pid']}" + ("" if here else f" on {value.get('host')}")


def _release(descriptor: int, path: Path, owner: int) -> None:
    """Closes a lock; its file goes where it has no value."""
    # A forked child inherits the descriptor, and its exit also runs this; the lock is its parent's to remove.
    if os.getpid() == owner and not os.fstat(descriptor).st_size and is_at(descriptor, path):
        _remove(path.unlink)
    close_file(descriptor, owner)
