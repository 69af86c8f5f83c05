"""The system's locks on open files (`flock`), which end with the process that holds them, whatever ends it.

Knows no name and no output: what is locked and why is said in `locks.py` and `temporary.py`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from paddlemix.errors import UserError

# What file systems without locks return; EBADF and EINVAL come from NFS for folders, EPERM from some FUSE mounts.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL, errno.EPERM)
_open: set[int] = set()  # descriptors of this process that may hold a lock


class LockingUnavailableError(UserError):
    """The file system has no locks."""


def remember(descriptor: int) -> None:
    """Notes an open file that may be locked, so that a forked process closes its copy."""
    _open.add(descriptor)


def lock_file(descriptor: int, path: Path, wait: bool) -> bool:
    """Locks an open file.

    Args:
        path: of the file, for the message.
        wait: whether to wait until it is free.

    Returns:
        False if another process holds the lock.

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


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Lets one process at a time make something that the others then find; they wait until it is done or has ended.

    Without a lock where the file system has none or the file cannot be made: then each makes it.

    Args:
        path: of the lock's file, which stays.
    """
    owner, descriptor = os.getpid(), None
    with contextlib.suppress(OSError, LockingUnavailableError):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        remember(descriptor)
        lock_file(descriptor, path, wait=True)
    try:
        yield
    finally:
        if descriptor is not None:
            close_file(descriptor, owner)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether a path still refers to the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def close_file(descriptor: int, owner: int) -> None:
    """Closes a file in the process that opened it.

    Args:
        owner: that process; in a forked one the copy is closed already, and its number may mean another file.
    """
    if os.getpid() == owner:
        _open.discard(descriptor)
        os.close(descriptor)


def _close_in_child() -> None:
    """A forked process shares its parent's locks, and would keep them if the parent is killed."""
    for descriptor in _open:
        os.close(descriptor)
    _open.clear()


os.register_at_fork(after_in_child=_close_in_child)
