"""A model's files from its hub into a directory that appears whole or not at all.

    download_model(ModelName.parse("lmsys/vicuna-7b-v1.5"), target, lambda: None)

A download grows in a hidden folder beside its place and is renamed when every file is there and checked: a killed one
leaves no half model, and the next one resumes it.  Knows no cache but the place that it is given.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from paddlemix.checkpoints.files.directories import writing
from paddlemix.checkpoints.hub.model_names import ModelName
from paddlemix.checkpoints.hub.needed_files import DECLARATIONS, needed_files, repository_of
from paddlemix.errors import UserError
from paddlemix.log import logger
from paddlemix.network.hugging_face import remove_bookkeeping
from paddlemix.network.transfer import PART_SUFFIX, RemoteFile, mismatch


def download_model(name: ModelName, target: Path, find: Callable[[], Path | None]) -> Path:
    """Downloads a model; several processes that want the same one wait for the first.

    Args:
        name: see `ModelName`.
        target: the directory to make, or to complete.
        find: called under the lock; returns the model's directory if another process fetched it meanwhile.

    Returns:
        `target`, or what `find` returned.

    Raises:
        UnreachableError: no such model, a token is needed, no network, or what arrived is damaged.
        UserError: `target` cannot be written.
    """
    # beside the target, so that the last step is a rename within one file system
    partial = target.with_name(f".{target.name}.partial")
    repository = repository_of(name)
    with writing(target):
        files = needed_files(repository, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(partial):
            found = find()
            if found is not None:
                return found
            partial.mkdir(exist_ok=True)
            _check_space(files, partial)
            logger.info("downloading %s from %s to %s: %d files", name.name, name.hub, target, len(files))
            for file in files:
                path = partial / file.path
                # complete from an earlier attempt? Size and checksum decide, else `receive` resumes or begins again
                if not path.is_file() or mismatch(path, file) is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    repository.receive(file, partial)
            remove_bookkeeping(partial)
            for part in partial.rglob(f"*{PART_SUFFIX}"):  # of other versions
                part.unlink()
            _put_in_place(partial, target)
    return target


@contextlib.contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """Holds the lock of a download; logs that it is waiting if another process has it."""
    lock = FileLock(f"{partial}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("another process is downloading to %s; waiting for it", partial.parent)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _check_space(files: list[RemoteFile], partial: Path) -> None:
    # what an earlier attempt left counts as downloaded; files of unknown size as nothing
    there = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    needed, free = sum(file.size or 0 for file in files) - there, shutil.disk_usage(partial).free
    if needed > free:
        raise UserError(f"the download needs {needed:,} bytes more, {partial.parent} has {free:,}; set PPMIX_HOME")


def _put_in_place(partial: Path, target: Path) -> None:
    """Renames a finished download; if `target` exists but is incomplete, the files are moved into it one by one."""
    if not target.exists():
        os.rename(partial, target)
        return
    # DECLARATIONS last: one of them makes the directory a model, see `resolve.local_model`
    names = [path.relative_to(partial) for path in partial.rglob("*") if path.is_file()]
    for name in sorted(names, key=lambda name: str(name) in DECLARATIONS):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / name, target / name)
    shutil.rmtree(partial)
