"""The shares of processes that write one file of answers together: found, resumed, and put together by the last one.

    answers.jsonl.0-of-2, answers.jsonl.1-of-2  ->  answers.jsonl

Knows no model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from paddlemix.datasets.records.record_file import RecordFile
from paddlemix.errors import UserError
from paddlemix.generation.answer_file import beside, is_complete, lock_of, read_header, whole_lines, write_lines
from paddlemix.generation.answer_header import IMAGES, check_images, compare_headers
from paddlemix.generation.predict_job import PredictJob


def count_failed(lines: list[bytes]) -> int:
    """Lines that hold an error in place of an answer."""
    return sum(b'"error": ' in line for line in lines)  # in a text its quotes would be escaped


def share_paths(job: PredictJob) -> list[Path]:
    """The files of all processes that write one output together, by their index."""
    return [beside(job.output, f"{index}-of-{job.chunk.count}") for index in range(job.chunk.count)]


def read_joined(job: PredictJob, header: dict[str, Any], records: RecordFile) -> list[bytes] | None:
    """The whole lines of an output that was made with the same arguments; None where there is no output.

    Raises:
        UserError: it was made with other arguments, about other pictures, or not by this command.
    """
    if job.overwrite or not job.output.exists():
        return None
    lock = lock_of(job.output, wait=True)
    try:
        found = lock.read()
        if not isinstance(found, dict):
            raise UserError(f"{job.output} was not written by this command; choose another name, or --overwrite")
        differences = compare_headers(found, {**header, "chunk": None})
        if differences:
            raise UserError(
                f"{job.output} was written with other arguments: {'; '.join(differences)}. Choose another --output, or "
                "begin again with --overwrite"
            )
        asked = job.asked(records, range(len(records)))
        lines = whole_lines(job.output, job.output.read_bytes().split(b"\n"), asked.ids)
        answered = np.array([b'"error": ' not in line for line in lines] + [False] * (len(records) - len(lines)), bool)
        check_images(job.output, found.get(IMAGES), asked, answered)
        return lines
    finally:
        lock.close()


def join_shares(job: PredictJob, header: dict[str, Any]) -> list[bytes] | None:
    """Puts the shares together where this process is the last to finish.

    Args:
        header: of this process's share.

    Returns:
        The lines of the whole file; None where another process still works on its share.

    Raises:
        UserError: it cannot be written; the shares stay.
    """
    paths = share_paths(job)
    lock = lock_of(job.output, wait=True)
    try:
        headers = ({**header, "chunk": [index, len(paths)]} for index in range(len(paths)))
        # under the lock of the output: of two processes that finish together exactly one sees all shares complete
        if not all(map(is_complete, paths, headers)):
            return None
        lines = [line for path in paths for line in _lines(path)]
        job.output.unlink(missing_ok=True)  # so that a new header is never beside the answers of another run
        images = [text for path in paths for text in read_header(path).get(IMAGES, [])]
        try:
            lock.write({**header, "chunk": None, IMAGES: images})
            write_lines(job.output, lines)
        except BaseException:  # the shares stay, and the next run puts them together
            lock.path.unlink(missing_ok=True)
            raise
        for path in paths:
            path.unlink()
            beside(path, "run.json").unlink()
        return lines
    finally:
        lock.close()


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1]
