"""Independent pieces of work, one per core, where paddle's own operators leave cores idle.

Paddle's CPU kernels for softmax, exponentials and broadcasting run on one thread, and a product of small matrices gains
little from more than one.  Pieces side by side, each with its share of the threads, keep every core busy in all of
them.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import paddle

T = TypeVar("T")

_this_thread = threading.local()


def cores() -> int:
    """Pieces that can be worked on at a time; 1 on other devices than CPU, inside a piece, and where paddle's OpenMP
    runtime cannot be set to one thread."""
    return threads_here() if paddle.get_device() == "cpu" and openmp() is not None else 1


def threads_here() -> int:
    """Threads of a kernel that this thread calls on CPU: 1 inside a piece, else as many as paddle's kernels have."""
    return 1 if getattr(_this_thread, "works", False) else _threads()


def map_on_cores(function: Callable[..., T], *columns: Iterable[Any], threads: int | None = None) -> list[T]:
    """Like `list(map(function, *columns))`, with no gradient recorded, and on all cores where `cores` is above 1.

    Args:
        function: what is done with a piece; it may call paddle, and this function again.
        columns: of one length; a piece is a row of them.
        threads: of every piece, so that its last bit does not depend on how many there are; None shares the cores out.

    Raises:
        Exception: the first that a piece raised.
    """
    # Below: all in this thread where there is one core or one piece, whose operators then have all threads themselves.
    rows, count = list(zip(*columns, strict=True)), cores()
    if count == 1 or (len(rows) == 1 and threads is None):
        with paddle.no_grad():
            return [function(*row) for row in rows]
    run = functools.partial(_run, function, threads or max(1, count // max(1, len(rows))))
    return list(_pool().map(run, rows))


def map_rows(
    function: Callable[[paddle.Tensor], paddle.Tensor], batch: paddle.Tensor, reproducible: bool
) -> paddle.Tensor:
    """function(batch), without a gradient: on CPU row by row on all cores, so that a row stays in a core's cache.

    Args:
        function: [n, ...] -> [n, ...] that treats rows independently.
        batch: [N, ...].
        reproducible: a row's last bit does not depend on how many rows there are.
    """
    if not batch.place.is_cpu_place():
        return function(batch)
    return paddle.concat(map_on_cores(function, batch.split(len(batch)), threads=1 if reproducible else None))


def _run(function: Callable[..., T], threads: int, row: tuple[Any, ...]) -> T:
    library = openmp()
    assert library is not None
    # Both settings are of this thread alone; the caller's stay as they are.
    library.omp_set_num_threads(threads)
    with paddle.no_grad():
        return function(*row)


def _threads() -> int:
    try:
        return max(int(os.environ.get("OMP_NUM_THREADS", "1").partition(",")[0]), 1)
    except ValueError:
        return 1


@functools.cache
def openmp() -> ctypes.CDLL | None:
    """The runtime that paddle's kernels use, its names given to libraries that are loaded later; None where it is
    another one."""
    # paddle has loaded it already; RTLD_GLOBAL lets libraries that are linked with none find its names
    path = Path(paddle.__file__).parent / "libs" / "libiomp5.so"
    try:
        return ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL) if path.exists() else None
    except OSError:
        return None


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_threads(), thread_name_prefix="core", initializer=_become_worker)


def _become_worker() -> None:
    _this_thread.works = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
