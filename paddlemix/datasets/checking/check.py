"""Every record of data files checked: parsed, rendered, measured, its images decoded; in parallel processes.

Returns a `CheckReport` and changes nothing; `problem_kinds.py` groups like messages.  The processes never load paddle.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from paddlemix.datasets.checking.problem_kinds import Problem, group_problems
from paddlemix.datasets.checking.record_checker import CheckSettings, DataFile, Findings, RecordChecker
from paddlemix.datasets.records.record_file import RecordFile, open_records
from paddlemix.datasets.workers import WorkerPool
from paddlemix.errors import MissingFileError, UserError

_CHUNK = 64  # records of one task: about a second of decoding
OnProgress = Callable[[int, int], None]
Task = tuple[int, int, int]  # file, first row, row after the last


@dataclass
class CheckReport:
    """What `check_files` found.

    Args:
        files: the data files, in order.
        records: how many were checked.
        bad: rows of each file, by its place in `files`, that cannot be used.
        problems: like messages together, the most frequent first; each names its source.
        doubts: the same of good records that may not mean what they are taken for.
        unreadable: how many files could not be read at all; they are among the problems.
        forms: records of each recognised form.
        duplicates: (source, source of the first) of records that repeat an earlier one word for word.
        too_long: good records longer than `max_length`, before the policy.
        skipped: of those, the ones that `on_too_long` "skip" leaves out.
        lengths: int32 [n, 2], tokens and visual tokens of the good records that were measured, after the policy.
    """

    files: tuple[DataFile, ...]
    records: int = 0
    bad: dict[int, set[int]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    doubts: list[Problem] = field(default_factory=list)
    unreadable: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    too_long: int = 0
    skipped: int = 0
    lengths: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int32))

    @property
    def num_bad(self) -> int:
        """Records that cannot be used."""
        return sum(map(len, self.bad.values()))

    @property
    def is_clean(self) -> bool:
        """Whether every record of every file can be used."""
        return not self.num_bad and not self.unreadable


def check_files(
    files: Sequence[DataFile], settings: CheckSettings, on_progress: OnProgress | None = None
) -> CheckReport:
    """Checks every record of data files.

    Args:
        files: at least one.
        settings: what is checked, and by how many processes.
        on_progress: is called with the records done and their total, after every few of them.

    Raises:
        MissingFileError: a data file does not exist.
        UserError: a process ended; what is wrong with the data is in the report instead.
    """
    report = CheckReport(tuple(files))
    messages: list[tuple[str, str]] = []
    opened: list[RecordFile | None] = []
    for file in files:
        try:
            # a file that does not exist stops the check: it is a mistake in its name, not in the data
            opened.append(open_records(file.path, file.form))
        except MissingFileError:
            raise
        except UserError as error:
            opened.append(None)
            report.unreadable += 1
            messages.append((file.path, str(error)))
    tasks = list(_tasks(opened, settings.limit))
    total = sum(stop - start for _, start, stop in tasks)
    checker = RecordChecker(opened, files, settings)
    hashes, lengths, doubts = [], [], list[tuple[str, str]]()
    # `closing`: an error in here must end the processes before it is shown
    with contextlib.closing(_run(tasks, checker, settings.workers)) as findings:
        for task, found in zip(tasks, findings, strict=True):
            messages += _add(report, task, found)
            doubts += [(files[task[0]].source(row), doubt) for row, doubt in found.doubts]
            hashes.append(found.hashes)
            lengths.append(found.lengths)
            if on_progress is not None:
                on_progress(report.records, total)
    report.problems, report.doubts = group_problems(messages), group_problems(doubts)
    report.lengths = np.concatenate([report.lengths, *lengths])
    report.duplicates = _duplicates(tasks, hashes, files)
    return report


def _add(report: CheckReport, task: Task, found: Findings) -> list[tuple[str, str]]:
    """Counts the findings of a task; returns source and message of what is wrong."""
    number, start, stop = task
    report.records += stop - start
    # also for a file without a bad record: its entry says that it was checked
    report.bad.setdefault(number, set()).update(row for row, _ in found.faults)
    report.forms += found.forms
    report.too_long += found.too_long
    report.skipped += found.skipped
    return [(report.files[number].source(row), message) for row, message in found.faults]


def _tasks(opened: Sequence[RecordFile | None], limit: int | None) -> Iterator[Task]:
    for number, records in enumerate(opened):
        size = 0 if records is None else len(records) if limit is None else min(len(records), limit)
        # small tasks: one slow picture holds up few records, and progress is visible
        for start in range(0, size, _CHUNK):
            yield number, start, min(start + _CHUNK, size)


def _duplicates(
    tasks: Sequence[Task], hashes: Sequence[np.ndarray], files: Sequence[DataFile]
) -> list[tuple[str, str]]:
    """(source, source of the first) of every row whose hash occurred before; 0 marks a row that could not be read."""
    if not tasks:
        return []
    values = np.concatenate(hashes)
    owners = np.concatenate([np.full(stop - start, number) for number, start, stop in tasks])
    rows = np.concatenate([np.arange(start, stop) for _, start, stop in tasks])
    # `first` is the earliest row of each hash, so a row that is not its own first repeats it
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    again = np.flatnonzero((first[inverse] != np.arange(len(values))) & (values != 0))
    return [
        (files[owners[place]].source(int(rows[place])), files[owners[one]].source(int(rows[one])))
        for place, one in zip(again, first[inverse[again]], strict=True)
    ]


def _run(tasks: Sequence[Task], checker: RecordChecker, workers: int) -> Generator[Findings, None, None]:
    """The findings of each task, in order.

    Raises:
        UserError: a process ended unexpectedly.
    """
    # below two tasks or workers, starting processes costs more than it saves
    workers = min(workers, len(tasks))
    if workers < 2:
        yield from (checker.check(*task) for task in tasks)
        return
    # the pool has no list of its processes; those that are new are its own
    before = set(multiprocessing.active_children())
    pool: WorkerPool[RecordChecker, Task, Findings] = WorkerPool(_work, checker, workers)
    done = 0
    try:
        for found in pool.map(tasks):
            done += 1
            yield found
    finally:
        if done < len(tasks):  # Ctrl-C or an error: a download may need minutes more, and nobody wants its result
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()
        pool.close()


def _work(checker: RecordChecker, task: Task) -> Findings:
    return checker.check(*task)
