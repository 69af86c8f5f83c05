"""Processes that work through a list in order and ahead of use; none of them ever loads paddle.

Large arrays of a result come back through shared memory, because a pipe would copy each several times.  Knows nothing
of what is computed.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from paddlemix.errors import UserError

Context = TypeVar("Context")
Item = TypeVar("Item")
Result = TypeVar("Result")
_AHEAD = 2  # results per process that are ready or under way before they are asked for
_SHARED_MEMORY = Path("/dev/shm")  # where the system has it
_LARGE = 256 * 1024  # bytes of arrays that are worth a file there
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # Source: glibc malloc.h, M_TRIM_THRESHOLD and M_MMAP_THRESHOLD


class WorkerPool(Generic[Context, Item, Result]):
    """Processes that share one context and one function.

    They start at the first use and stay until `close`, or until nothing refers to the pool.

    Args:
        function: `function(context, item)`, defined at the top of a module that does not import paddle.
        context: sent to each process once; has to survive pickling.
        processes: >= 1.
    """

    def __init__(self, function: Callable[[Context, Item], Result], context: Context, processes: int) -> None:
        self._function, self._context, self.processes = function, context, processes
        self._pool: ProcessPoolExecutor | None = None
        self._end: weakref.finalize[..., Any] | None = None

    def map(self, items: Iterable[Item]) -> Iterator[Result]:
        """Results in the order of the items; what is under way when the iteration is left is dropped.

        Raises:
            UserError: a process ended, e.g. because memory ran out.
            Exception: whatever the function raised, in its item's turn.
        """
        # In order: a result that is ready early waits for its turn.  A bounded number is under way, so that a slow
        # consumer does not fill the memory.
        waiting: deque[Future[_Parcel]] = deque()
        try:
            for item in items:
                waiting.append(self._submit(item))
                if len(waiting) > self.processes * _AHEAD:
                    yield _unpack(waiting.popleft().result())
            while waiting:
                yield _unpack(waiting.popleft().result())
        except BrokenProcessPool as error:
            self.close()
            raise UserError(
                f"one of {self.processes} data worker processes ended without a word; most often memory ran out: lower "
                "dataloader_num_workers (0 works in the main process) or the batch size; a script that starts workers "
                'needs `if __name__ == "__main__":` around its own calls'
            ) from error
        finally:
            for future in waiting:  # not cancelled: the pool's own thread fails over such a one when a process ends
                future.add_done_callback(_discard)

    def _submit(self, item: Item) -> Future[_Parcel]:
        if self._pool is None:
            folder = _shared_folder()
            # "spawn": a fork of a process whose paddle threads are running can hang
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.processes, context, _start, (self._function, self._context, folder))
            self._end = weakref.finalize(self, _end, self._pool, folder)
        return self._pool.submit(_work, item)

    def close(self) -> None:
        """Ends the processes as soon as they are done with what is under way; a later `map` starts new ones."""
        if self._end is not None:
            self._end()
        self._pool = self._end = None


def _end(pool: ProcessPoolExecutor, folder: str | None) -> None:
    """Ends the processes, and removes their folder when none can write to it any more."""

    def end() -> None:
        pool.shutdown(wait=True, cancel_futures=True)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    if threading.main_thread().is_alive():
        threading.Thread(target=end).start()  # nobody has to wait for the last item
    else:  # the interpreter is about to end, and would not wait for a thread
        end()


@dataclass(frozen=True)
class _Parcel:
    """A result on its way: pickled, its large arrays in a file of shared memory, one after the other.

    Args:
        pickled: the rest.
        path: of the file; None where there is none.
        sizes: bytes of each array.
    """

    pickled: bytes
    path: str | None = None
    sizes: tuple[int, ...] = ()


def _shared_folder() -> str | None:
    """A new folder in shared memory; None where the system has none."""
    try:
        return tempfile.mkdtemp(prefix="paddlemix-", dir=_SHARED_MEMORY)
    except OSError:
        return None


def _pack(result: Any, folder: str | None) -> _Parcel:
    """What goes through the pipe.  Without shared memory, or where it is full, that is everything."""
    buffers: list[pickle.PickleBuffer] = []
    if folder is not None:
        pickled = pickle.dumps(result, protocol=5, buffer_callback=buffers.append)
        arrays = [buffer.raw() for buffer in buffers]
        sizes = tuple(array.nbytes for array in arrays)
        # small results: a file of their own would cost more than the copies through the pipe
        if sum(sizes) >= _LARGE:
            with contextlib.suppress(OSError):
                return _Parcel(pickled, _write(folder, arrays), sizes)
    return _Parcel(pickle.dumps(result, protocol=5))


def _write(folder: str, arrays: list[memoryview]) -> str:
    """Writes arrays into a new file; a map of the file would end the process where memory is full, a write raises."""
    descriptor, path = tempfile.mkstemp(dir=folder)
    try:
        with open(descriptor, "wb", buffering=0) as file:
            for array in arrays:
                while len(array):
                    array = array[file.write(array) :]
    except OSError:
        os.unlink(path)
        raise
    return path


def _unpack(parcel: _Parcel) -> Any:
    """The result; its arrays lie in the shared memory, which is freed together with the last of them."""
    if parcel.path is None:
        return pickle.loads(parcel.pickled)  # noqa: S301  made by our own process
    # ACCESS_COPY: a consumer may write into an array; pages are copied only where it does
    with open(parcel.path, "rb") as file:
        shared = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    # the mapping keeps the memory alive; without a name nothing is left if this process is killed
    os.unlink(parcel.path)
    ends = [sum(parcel.sizes[: number + 1]) for number in range(len(parcel.sizes))]
    arrays = [shared[end - size : end] for end, size in zip(ends, parcel.sizes, strict=True)]
    return pickle.loads(parcel.pickled, buffers=arrays)  # noqa: S301  made by our own process


def _discard(future: Future[_Parcel]) -> None:
    """Frees the memory of a result that nobody wants."""
    if not future.cancelled() and future.exception() is None:
        path = future.result().path
        if path is not None:
            Path(path).unlink(missing_ok=True)


_task: tuple[Callable[[Any, Any], Any], Any, str | None] | None = None


def _start(function: Callable[[Any, Any], Any], context: Any, folder: str | None) -> None:
    """Makes a new process ready: it leaves Ctrl-C to the main process and ends when that one does."""
    global _task
    _task = (function, context, folder)
    # Ctrl-C reaches the whole process group; the main process ends the pool in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _keep_freed_memory()
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()


def _keep_freed_memory() -> None:
    """Freed arrays of images stay with the process for the next ones; asking the system for each costs a tenth of
    a worker's time.  Where the C library is not glibc nothing changes."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, 1024**3)
        library.mallopt(_TRIM_THRESHOLD, 1024**3)


def _end_with_parent(folder: str | None) -> None:
    """A killed parent would leave this process waiting for ever, and its shared memory occupied."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)


def _work(item: Any) -> _Parcel:
    if _task is None:
        raise RuntimeError("the process was not made ready")
    function, context, folder = _task
    return _pack(function(context, item), folder)
