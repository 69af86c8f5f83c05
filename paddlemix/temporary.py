"""Files and folders under temporary names, whose locks tell whether anybody is still writing them.

What a killed process left under such a name is not locked any more, and `remove_leftovers` removes only that.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from paddlemix.file_locks import LockingUnavailableError, close_file, is_at, lock_file, remember

LOCK_FILE = ".paddlemix.lock"  # in a folder that a command writes into
NAME_LENGTH = 40  # characters of a file's name that its temporary name repeats
_MARK = ".paddlemix-tmp"
_TEMPORARY = re.compile(rf"\..*{re.escape(_MARK)}(\.\w+)?", re.DOTALL)
_REPLACED = ".replaced."  # in the name of a folder that holds what is just being replaced


@contextlib.contextmanager
def temporary_directory(folder: Path, name: str, replaced: bool = False) -> Iterator[Path]:
    """A new hidden directory in a folder, held while the block runs and gone afterwards, unless the block renamed it.

    Args:
        name: of the output.
        replaced: whether it holds what is being replaced, which `remove_leftovers` puts back if nothing took its
            place.
    """
    prefix = f".{name[:NAME_LENGTH]}{_REPLACED if replaced else '.'}"
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, suffix=_MARK, dir=folder))
        # A new folder is unlocked for a moment, so that another process may remove it as a leftover; then make another
        # one.
        with contextlib.suppress(FileNotFoundError):  # removed as a leftover before it could be held
            descriptor = os.open(path, os.O_RDONLY)
            if _hold_temporary(descriptor, path):
                break
    whole, owner = False, os.getpid()
    try:
        yield path
        whole = True
    finally:
        # when                           -> what becomes of the folder
        # the block ended well           -> removed: what it held has been replaced, or moved to its place
        # it failed, holds new files     -> removed: they are incomplete
        # it failed, holds replaced ones -> kept if anything is in it; `remove_leftovers` puts it back
        if whole or not replaced:
            shutil.rmtree(path, ignore_errors=True)
        else:  # it may hold the only copy
            with contextlib.suppress(OSError):
                path.rmdir()
        close_file(descriptor, owner)


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """A new hidden file beside a path, of the same suffix, held while the block runs and gone afterwards."""
    (descriptor, temporary), owner = new_temporary_file(path), os.getpid()
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        close_file(descriptor, owner)


def umask() -> int:
    """The permission bits that this process withholds from new files and folders, 0 to 0o777.

    Linux lists it.  Elsewhere it can only be read by setting it, which every thread sees: to the strictest value, so
    that what they create meanwhile is too private rather than too open.
    """
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def new_temporary_file(path: Path) -> tuple[int, Path]:
    """A new hidden file beside a path, of the same suffix: open, and held."""
    while True:
        prefix, suffix = f".{path.name[:NAME_LENGTH]}.", _MARK + path.suffix
        descriptor, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=path.parent)
        os.fchmod(descriptor, 0o666 & ~umask())  # temporary files are private, what is kept need not be
        if _hold_temporary(descriptor, Path(name)):
            return descriptor, Path(name)


def _hold_temporary(descriptor: int, path: Path) -> bool:
    """Locks what was just made; False, and it is closed, if it was removed as a leftover before that."""
    remember(descriptor)
    with contextlib.suppress(LockingUnavailableError):  # then nobody removes it either
        lock_file(descriptor, path, wait=True)
    if is_at(descriptor, path):
        return True
    close_file(descriptor, os.getpid())
    return False


def remove_leftovers(folder: Path) -> list[Path]:
    """Removes what killed processes left in a folder under temporary names; what is still being written stays.

    A folder that was being replaced when its process was killed is put back, if its place is still free.

    Returns:
        What was removed or put back.
    """
    try:
        paths = [Path(entry.path) for entry in os.scandir(folder) if is_temporary(Path(entry.name))]
    except OSError:  # no such folder, or none that may be read
        return []
    return [path for path in sorted(paths) if _remove_unheld(path)]


def is_temporary(path: Path) -> bool:
    """Whether a path's name is that of something being written, or of a lock."""
    is_lock = path.name.startswith(".") and path.name.endswith(LOCK_FILE)
    return is_lock or _TEMPORARY.fullmatch(path.name) is not None


def _remove_unheld(path: Path) -> bool:
    try:
        # Never through a link: what it leads to was not made by us.  Locks on network file systems need write access,
        # hence O_RDWR for files; folders cannot be opened for writing.
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW if path.is_file() else os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        # A live process holds its lock until it is done, so a free lock means that the process was killed.
        if not lock_file(descriptor, path, wait=False) or not is_at(descriptor, path):
            return False
        if not path.is_dir():
            path.unlink()
            return True
        # Holds the only copy of what was there: put back before the rest is removed.
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
