"""Who writes what at the moment: one lock per output, and temporary names that tell whether anybody still uses them.

A lock is the system's (`flock`), which ends with the process that has it, whatever ends that.  So what a killed process
left under a temporary name differs from what is being written, and `remove_leftovers` removes only the former.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from paddlemix.errors import UserError

LOCK_FILE = ".paddlemix.lock"  # in a folder that a command writes into
_MARK = ".paddlemix-tmp"
_TEMPORARY = re.compile(rf"\..*{re.escape(_MARK)}(\.\w+)?", re.DOTALL)
_REPLACED = ".replaced."  # in the name of a folder that holds what is just being replaced
_NAME = 40  # characters of a file's name that its temporary name repeats
_UMASK = os.umask(0o022)
os.umask(_UMASK)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL, errno.EPERM)


class LockingUnavailableError(UserError):
    """The file system has no locks."""


class Locked:
    """A small JSON file that this process alone has open for writing until it closes it or ends.

    One that has no value when it is closed is removed.

    Args:
        path: made where it is missing.
        what: the output that it belongs to and what it is of that, for messages of writes that fail.
        busy: the message for when another process has it, from the file's value (None where it has none).
        wait: until it is free.

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
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            _open.add(descriptor)
            self._hold(descriptor)
            try:
                if not _hold(descriptor, path, wait):
                    raise UserError(busy(self.read()))
            except BaseException:
                self._release.detach()  # it may be another process's, empty for a moment
                _close(descriptor, os.getpid())
                raise
            if _is_at(descriptor, path):
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
            descriptor, temporary = _new_file(self.path)
            try:
                while data:
                    data = data[os.write(descriptor, data) :]
                os.fsync(descriptor)
                os.replace(temporary, self.path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                _close(descriptor, os.getpid())
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
        path: the folder, made where it is missing and removed again where nothing comes into it; or, not `inside`, any
            path: the lock is then beside it, for what appears in one step.
        what: the flag or key that names it, for messages.

    Raises:
        UserError: another process writes it (names the process), or no lock can be made there.
    """
    path = Path(os.path.realpath(path))
    folder = path if inside else path.parent
    place = folder / LOCK_FILE if inside else folder / f".{path.name[:_NAME]}{LOCK_FILE}"
    with contextlib.ExitStack() as stack:
        with write_errors(f"{what} '{path}'"):
            stack.enter_context(made_folder(folder))
        try:
            lock = Locked(
                place,
                f"{what} '{path}' (its lock, {place.name})",
                lambda value: f"{what} '{path}' is being written by {_writer(value)}; wait for it, or choose another",
            )
        except LockingUnavailableError as error:
            _remove(place.unlink)
            logging.getLogger("paddlemix").warning("%s: start nothing else that writes %s", error, path)
            yield
            return
        stack.callback(lock.close)
        stack.callback(_remove, place.unlink)  # while it is held
        lock.write({"pid": os.getpid(), "host": socket.gethostname()})
        yield


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Makes a folder and those that it is in; what is empty of the new ones when the block ends is removed again."""
    made = [missing for missing in (folder, *folder.parents) if not os.path.exists(missing)]
    with contextlib.ExitStack() as stack:
        for directory in reversed(made):
            stack.callback(_remove, directory.rmdir)  # which fails where something is in it
        folder.mkdir(parents=True, exist_ok=True)
        yield


def _remove(remove: Callable[[], None]) -> None:
    """What cannot be removed stays, and hides no error of what was done."""
    with contextlib.suppress(OSError):
        remove()


def _writer(value: Any) -> str:
    if not isinstance(value, dict) or "pid" not in value:
        return "another process"
    here = value.get("host") == socket.gethostname()
    return f"process {value['pid']}" + ("" if here else f" on {value.get('host')}")


@contextlib.contextmanager
def temporary_directory(folder: Path, name: str, replaced: bool = False) -> Iterator[Path]:
    """A new hidden directory in a folder, held while the block runs and gone afterwards, unless the block renamed it.

    Args:
        name: of what it is for.
        replaced: it is to hold what is being replaced, which `remove_leftovers` puts back where nothing came in its
            place.
    """
    prefix = f".{name[:_NAME]}{_REPLACED if replaced else '.'}"
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, suffix=_MARK, dir=folder))
        with contextlib.suppress(FileNotFoundError):  # removed as a leftover before it could be held
            descriptor = os.open(path, os.O_RDONLY)
            if _hold_temporary(descriptor, path):
                break
    whole, owner = False, os.getpid()
    try:
        yield path
        whole = True
    finally:
        if whole or not replaced:
            shutil.rmtree(path, ignore_errors=True)
        else:  # it may hold the only copy
            with contextlib.suppress(OSError):
                path.rmdir()
        _close(descriptor, owner)


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """A new hidden file beside a path, of the same suffix, held while the block runs and gone afterwards."""
    (descriptor, temporary), owner = _new_file(path), os.getpid()
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        _close(descriptor, owner)


def _new_file(path: Path) -> tuple[int, Path]:
    """A new hidden file beside a path, of the same suffix: open, and held."""
    while True:
        prefix, suffix = f".{path.name[:_NAME]}.", _MARK + path.suffix
        descriptor, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=path.parent)
        os.fchmod(descriptor, 0o666 & ~_UMASK)  # temporary files are private, what is kept need not be
        if _hold_temporary(descriptor, Path(name)):
            return descriptor, Path(name)


def _hold_temporary(descriptor: int, path: Path) -> bool:
    """Holds what was just made; False, and it is closed, where it was removed as a leftover before."""
    _open.add(descriptor)
    with contextlib.suppress(LockingUnavailableError):  # then nobody removes it either
        _hold(descriptor, path, wait=True)
    if _is_at(descriptor, path):
        return True
    _close(descriptor, os.getpid())
    return False


def remove_leftovers(folder: Path) -> list[Path]:
    """Removes what killed processes left in a folder under temporary names; what somebody still writes stays.

    What was being replaced when its process was killed comes back to its place, where nothing is there now.

    Returns:
        What was removed or put back.
    """
    try:
        paths = [Path(entry.path) for entry in os.scandir(folder) if is_temporary(Path(entry.name))]
    except OSError:  # no such folder, or none that may be read
        return []
    return [path for path in sorted(paths) if _remove_unheld(path)]


def is_temporary(path: Path) -> bool:
    """Whether a path's name is one that commands give to what they are still writing, or a lock's."""
    is_lock = path.name.startswith(".") and path.name.endswith(LOCK_FILE)
    return is_lock or _TEMPORARY.fullmatch(path.name) is not None


def _remove_unheld(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW if path.is_file() else os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        if not _hold(descriptor, path, wait=False) or not _is_at(descriptor, path):
            return False
        if not path.is_dir():
            path.unlink()
            return True
        if _REPLACED in path.name:
            for entry in path.iterdir():
                if not (path.parent / entry.name).exists():
                    os.rename(entry, path.parent / entry.name)
        shutil.rmtree(path, ignore_errors=True)
        return True
    except (LockingUnavailableError, OSError):
        return False
    finally:
        os.close(descriptor)


def _hold(descriptor: int, path: Path, wait: bool) -> bool:
    """Locks an open file; False where another process has it.

    Raises:
        LockingUnavailableError: there are no locks there (NFS has none for directories).
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise LockingUnavailableError(f"the file system of {path} has no locks ({error.strerror})") from error
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether a path still means the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _release(descriptor: int, path: Path, owner: int) -> None:
    """Closes a lock; its file goes where it has no value."""
    if os.getpid() == owner and not os.fstat(descriptor).st_size and _is_at(descriptor, path):
        _remove(path.unlink)
    _close(descriptor, owner)


def _close(descriptor: int, owner: int) -> None:
    if os.getpid() == owner:
        _open.discard(descriptor)
        os.close(descriptor)


def _close_in_child() -> None:
    """A forked process shares its parent's locks, and would keep them where that is killed."""
    for descriptor in _open:
        os.close(descriptor)
    _open.clear()


_open: set[int] = set()  # descriptors with a lock, of this process
os.register_at_fork(after_in_child=_close_in_child)
