"""One directory written by several processes: each safetensors file by one of them in turn, and all of it or nothing.

Every process makes the same calls.  File k is written by process k modulo `Layout.writers`, which together hold
everything; where a tensor's numbers are on several of them, the others take part as its turn comes.  A process that
fails, as on a full disk, goes on taking part, or the others would wait for it for ever, and reports its
error at the end, which then ends all of them alike.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from paddlemix.checkpoints.files.directories import is_seen
from paddlemix.checkpoints.files.finite import NotFiniteError, all_finite
from paddlemix.checkpoints.files.shards import TensorFile
from paddlemix.checkpoints.files.tensors import TensorEntry
from paddlemix.checkpoints.files.weight_files import write_safetensors
from paddlemix.errors import UserError
from paddlemix.parallel.collectives import gathered_objects
from paddlemix.parallel.layout import ALONE, Layout

_Failure = UserError | OSError  # after these a process can go on; any other error ends it at once


@dataclass(frozen=True)
class DirectoryFiles:
    """The files of a directory before they are written: on every process the same, in the same order.

    Args:
        tensors: written in turn; the first one by the first process.
        others: each writes further files into the directory that it is given, on the first process alone.
    """

    tensors: list[TensorFile] = field(default_factory=list)
    others: list[Callable[[Path], None]] = field(default_factory=list)


def write_files(
    directory: Path,
    files: DirectoryFiles,
    layout: Layout = ALONE,
    digest: Callable[[Path], Any] = lambda path: None,
) -> dict[str, Any]:
    """Writes files into an existing directory; to be called by every process.

    Args:
        digest: called with each tensor file that this process has written.

    Returns:
        Name of each tensor file, whoever wrote it -> what `digest` returned.

    Raises:
        UserError: a file cannot be written, or a tensor holds NaN or infinity (NotFiniteError), on any process.
        OSError: the same, where there is one process.
    """
    failure: _Failure | None = None
    if layout.rank == 0:
        try:
            for write in files.others:
                write(directory)
        except (UserError, OSError) as error:
            failure = error
    own: dict[str, Any] = {}
    for number, file in enumerate(files.tensors if layout.writes else ()):
        if number % layout.writers != layout.rank or failure is not None:
            _take_part(file.tensors.values())
            continue
        failure = _write(directory, file)
        try:
            own[file.name] = None if failure is not None else digest(directory / file.name)
        except (UserError, OSError) as error:
            failure = error
    digests: dict[str, Any] = {}
    for part in raise_alike(failure, own):
        digests |= part
    return digests


def _write(directory: Path, file: TensorFile) -> _Failure | None:
    # Those whose turn to be gathered has not come yet.
    waiting = {name: entry for name, entry in file.tensors.items() if entry.share is not None}

    def tracked(name: str, entry: TensorEntry) -> TensorEntry:
        def read() -> np.ndarray:
            del waiting[name]
            return entry.read()

        return replace(entry, read=read) if name in waiting else entry

    failure: _Failure | None = None
    tensors = {name: tracked(name, entry) for name, entry in file.tensors.items()}
    try:
        write_safetensors(directory / file.name, all_finite(tensors), file.metadata)
    except (UserError, OSError) as error:
        failure = error
    # The other processes are still in the gathering of what was not written.
    _take_part(list(waiting.values()))
    return failure


def _take_part(entries: Iterable[TensorEntry]) -> None:
    for entry in entries:
        if entry.share is not None:
            entry.share()


@contextlib.contextmanager
def alike() -> Iterator[None]:
    """After this block either every process goes on, or every process raises the same error; see `raise_alike`.

    The block must not wait for other processes: one that has failed would not come.
    """
    failure: _Failure | None = None
    try:
        yield
    except (UserError, OSError) as error:
        failure = error
    raise_alike(failure)


def raise_alike(failure: _Failure | None, value: Any = None) -> list[Any]:
    """Returns on every process where none has failed; otherwise raises the first one's error on all of them.

    Args:
        failure: of this process.
        value: what this process tells the others.

    Returns:
        The value of every process, by rank.

    Raises:
        UserError: names the process; a NotFiniteError stays one, because the tensor is no single process's.  With one
            process its own error.
    """
    report = failure if failure is None or isinstance(failure, NotFiniteError) else str(failure)
    told = gathered_objects((report, value))
    if len(told) == 1 and failure is not None:
        raise failure
    for rank, (report, _) in enumerate(told):
        if isinstance(report, NotFiniteError):
            raise report from failure
        if report is not None:
            raise UserError(f"process {rank}: {report}") from failure
    return [value for _, value in told]


@contextlib.contextmanager
def joint_directory(make: contextlib.AbstractContextManager[Path], layout: Layout = ALONE) -> Iterator[Path]:
    """A directory that all processes write into, made and finished by the first.

    The block raises on every process or on none, as `write_files` and `alike` do.

    Args:
        make: makes the directory, and moves it to its place when the block has ended without an error; entered on the
            first process alone.

    Raises:
        UserError: see `raise_alike`; or a process that writes does not see the directory.
    """
    with contextlib.ExitStack() as stack:
        made, failure = None, None
        if layout.rank == 0:
            try:
                made = stack.enter_context(make)
            except (UserError, OSError) as error:
                failure = error
        directory: Path = raise_alike(failure, made)[0]
        with alike():
            _check_visible(directory, layout)
        yield directory
        # Everybody has written everything: who was killed meanwhile never came here, and the others wait for it.
        with alike():
            stack.close()


def _check_visible(directory: Path, layout: Layout) -> None:
    # Under its random name nothing else can be there.
    if layout.writes and not is_seen(directory):
        raise UserError(
            f"'{directory}', which process 0 has made, does not exist on {socket.gethostname()}: several machines need "
            "an output_dir on a file system that they share"
        )
