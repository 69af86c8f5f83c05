"""Whether records can be used, and how many words each has: by this process or by several, none of which loads paddle.

Turns places of records into numbers and messages; the records themselves are dropped again.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from json import JSONDecodeError

import numpy as np

from paddlemix.datasets.forms.image_keys import folders_of
from paddlemix.datasets.forms.image_markers import unread_picture
from paddlemix.datasets.forms.parse import parse_record
from paddlemix.datasets.order import count_words
from paddlemix.datasets.records.json_values import DECODER, not_an_object, undecodable
from paddlemix.datasets.records.scan import WHITE, Spans
from paddlemix.errors import UserError
from paddlemix.log import logger
from paddlemix.sample import Sample

_MOST_PROCESSES = 8  # one process finds the records, about eight times as fast as one checks them
_AHEAD = 4  # blocks that wait for each process


@dataclass(frozen=True)
class CheckedRecords:
    """What became of the records of one `Spans`.

    Args:
        words: int32 [k], see `order.count_words`; 0 where the record cannot be used.
        problems: number in the file and what is wrong, beginning with "record N"; of each that cannot be used.
        doubts: the same of each that can be used and may not mean what it is taken for, see `unread_picture`.
        folders: that local images of the records are in, see `folders_of`.
        broken: the first record at which the array itself is not JSON or holds something else; later ones are
            not checked.
    """

    words: np.ndarray
    problems: list[tuple[int, str]]
    doubts: list[tuple[int, str]]
    folders: set[str]
    broken: int | None = None


@dataclass(frozen=True)
class Task:
    """Records to check.

    Args:
        path: the file.
        spans: where they are.
        first: number of the first one.
        form: see `parse.parse_record`.
    """

    path: str
    spans: Spans
    first: int
    form: str | None


def check_records(task: Task) -> CheckedRecords:
    """Decodes and parses records.

    Raises:
        OSError: the file cannot be read.
    """
    spans = task.spans
    words = np.zeros(len(spans.starts), np.int32)
    problems: list[tuple[int, str]] = []
    doubts: list[tuple[int, str]] = []
    folders: set[str] = set()
    data = _read(task.path, spans.previous, int(spans.ends[-1]))
    before = 0
    bounds = zip((spans.starts - spans.previous).tolist(), (spans.ends - spans.previous).tolist(), strict=True)
    for index, (start, end) in enumerate(bounds):
        number = task.first + index
        source = f"record {number}" if spans.lines is None else f"record {number} (line {spans.lines[index]})"
        # between two items exactly one comma; anything else means that the brackets were misread
        if spans.lines is None and data[before:start].strip(WHITE) != (b"," if number else b""):
            return CheckedRecords(words, problems, doubts, folders, number)
        try:
            sample = _sample_of(data[start:end], source, task.form)
            words[index] = count_words(sample)
            folders |= folders_of(sample.images)
            doubt = unread_picture(sample.messages)
            # used all the same: words that look like a picture may be meant as words
            doubts += [(number, f"{source}: {doubt}")] if doubt is not None else []
        except (JSONDecodeError, UnicodeDecodeError, TypeError) as error:
            if spans.lines is None:
                return CheckedRecords(words, problems, doubts, folders, number)
            problems.append((number, f"{source}: {_explain(error)}"))
        except UserError as error:
            problems.append((number, str(error)))
        before = end
    return CheckedRecords(words, problems, doubts, folders)


def _read(path: str, start: int, end: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), end - start, start)


def _sample_of(data: bytes, source: str, form: str | None) -> Sample:
    """A record that can be used.

    Raises:
        JSONDecodeError, UnicodeDecodeError: it is not JSON.
        TypeError: it is not an object.
        UserError: it cannot be used otherwise.
    """
    try:
        record = DECODER.decode(data.decode("utf-8"))
    except (JSONDecodeError, UnicodeDecodeError):
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: {undecodable(error)}") from error
    if not isinstance(record, dict):
        raise TypeError(not_an_object(record))
    return parse_record(record, source, form=form)


def _explain(error: Exception) -> str:
    if isinstance(error, JSONDecodeError):
        return f"not JSON: column {error.pos + 1}: {error.msg}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start} of the line); save the file as UTF-8"
    return str(error)


def check_all(tasks: Iterable[Task], parallel: bool) -> Iterator[tuple[Spans, CheckedRecords]]:
    """Checks tasks in order.

    Args:
        tasks: none without records.
        parallel: several processes, which need a second to start.

    Raises:
        OSError: the file cannot be read.
    """
    # large file, ordinary process -> several processes
    # else                         -> this one
    if parallel and not multiprocessing.current_process().daemon:  # those may not have children
        return _by_processes(tasks)
    return ((task.spans, check_records(task)) for task in tasks)


def _by_processes(tasks: Iterable[Task]) -> Iterator[tuple[Spans, CheckedRecords]]:
    workers = min(_num_processors(), _MOST_PROCESSES)
    # "spawn": a fork of a process whose paddle threads are running can hang
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    waiting: deque[tuple[Task, Future[CheckedRecords]]] = deque()
    left = iter(tasks)
    task: Task | None = None  # the one that is being handed over
    try:
        for task in left:
            waiting.append((task, pool.submit(check_records, task)))
            task = None
            if len(waiting) > workers * _AHEAD:
                yield _finished(waiting)
        while waiting:
            yield _finished(waiting)
    except BrokenProcessPool:
        logger.warning("a process that checks records ended unexpectedly; this one continues alone, more slowly")
        # nothing is lost: what was handed over and has no result is checked here, then all that is left
        for rest in [*(first for first, _ in waiting), *([task] if task else [])]:
            yield rest.spans, check_records(rest)
        for rest in left:
            yield rest.spans, check_records(rest)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _num_processors() -> int:
    if hasattr(os, "sched_getaffinity"):  # not everywhere; knows the limits of a container or a batch system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _finished(waiting: deque[tuple[Task, Future[CheckedRecords]]]) -> tuple[Spans, CheckedRecords]:
    """Takes the first one away, once it has a result."""
    task, future = waiting[0]
    checked = future.result()
    waiting.popleft()
    return task.spans, checked
