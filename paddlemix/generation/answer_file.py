"""A file of answers that any kill leaves whole: each question's line once, in the questions' order, or not there yet.

    answers.jsonl            appears complete, in one step
    answers.jsonl.partial    while it is made: `number TAB line` per answer, in the order in which they came
    answers.jsonl.run.json   what it was made with; a later run with anything else is refused

A batch of answers is appended by one write and flushed to the disk; a half line at the end is what a kill left and is
cut off.  Knows no model; what a line is, `answer_line` says.
"""

from __future__ import annotations

import itertools
import json
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paddlemix.cache import replacing
from paddlemix.errors import UserError
from paddlemix.generation.answer_header import IMAGES, Asked, check_images, compare_headers, known_images
from paddlemix.generation.answer_line import ANY_QUESTION, read_line
from paddlemix.locks import Locked, made_folder, write_errors
from paddlemix.log import logger
from paddlemix.temporary import remove_leftovers

_MISSING, _FAILED, _ANSWERED = 0, 1, 2


class AnswerFile:
    """The answers to the questions of one run; one process at a time may have it open.

    Args:
        path: where the answers go; its folder is made.
        header: what they depend on: JSON values by name.
        numbers: of the questions whose answers it holds, ascending.
        earlier: lines of all these questions from a run before, the failed ones of which are asked again; None reads
            them from `path`, where it is.  From the first on that is cut short or damaged they are asked again, too.
        overwrite: forget what is there.
        asked: what is known of each of these questions; None checks neither pictures nor whose line a line is.

    Raises:
        UserError: another process has it open, it was made with another header (lists the differences), `path` is there
            and was not made by such a run, or it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        header: Mapping[str, Any],
        numbers: range,
        earlier: Iterable[bytes] | None = None,
        overwrite: bool = False,
        asked: Asked | None = None,
    ) -> None:
        self.path, self._numbers = path, numbers
        self._ids = [ANY_QUESTION] * len(numbers) if asked is None else asked.ids
        self._partial = beside(path, "partial")
        self._state = np.zeros(len(numbers), np.uint8)
        # Answers stay in the file: only their places are in memory, 16 bytes each.
        self._places = np.zeros((len(numbers), 2), np.int64)  # first byte and length of each line in the partial file
        with write_errors(f"'{path}'"), made_folder(path.parent):
            self._lock = lock_of(path)
            if overwrite:
                self._partial.unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            # only what this process has begun may be removed when it fails
            begun = not self._partial.exists()
            try:
                self._open(header, earlier, asked, begun and not path.exists())
            except BaseException:
                if begun:  # what was there before is all that stays
                    self._partial.unlink(missing_ok=True)
                self.abandon()
                raise

    def _open(
        self, header: Mapping[str, Any], earlier: Iterable[bytes] | None, asked: Asked | None, fresh: bool
    ) -> None:
        """Writes or compares the header, and finds out which questions have an answer."""
        before = _claim(self._lock, self.path, header, asked, fresh)
        if not self._partial.exists():
            self._begin(_lines(self.path) if earlier is None and self.path.exists() else earlier)
        self._descriptor = os.open(self._partial, os.O_RDWR | os.O_APPEND)
        weakref.finalize(self, os.close, self._descriptor)
        self._read()
        # after `_read`: only pictures of questions that have an answer must not have changed
        if before is not None and asked is not None:
            check_images(self.path, before.get(IMAGES), asked, self._state == _ANSWERED)
            self._lock.write({**header, IMAGES: known_images(before.get(IMAGES), asked)})

    def abandon(self) -> None:
        """Ends without a finished file and releases the lock.  Where there is no answer, nothing stays."""
        try:
            empty = not self._partial.stat().st_size
        except FileNotFoundError:
            empty = True
        if empty and not self.path.exists():
            for path in (self._partial, self._lock.path):
                path.unlink(missing_ok=True)
        self._lock.close()

    def _begin(self, lines: Iterable[bytes] | None) -> None:
        kept = [] if lines is None else whole_lines(self.path, lines, self._ids)
        write_lines(self._partial, (b"%d\t%s" % pair for pair in zip(self._numbers, kept, strict=False)))

    def _read(self) -> None:
        """Learns which answers are there and cuts off what follows the last whole line."""
        end = 0
        with open(self._partial, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._note(line, end)
                end += len(line)
        # half a line: the process was killed while it wrote
        if end != os.fstat(self._descriptor).st_size:
            os.ftruncate(self._descriptor, end)
        self._size = end

    def _note(self, line: bytes, place: int) -> None:
        number, tab, text = line.partition(b"\t")
        try:
            index = self._numbers.index(int(number))
        except ValueError:
            index = -1
        # number and identity must both fit: a file of another list of questions would else pass for this one
        answer = read_line(text, self._ids[index]) if index >= 0 else None
        if answer is None:
            raise UserError(f"{self._partial} is damaged at byte {place}; begin again with --overwrite")
        self._state[index] = _FAILED if "error" in answer else _ANSWERED
        self._places[index] = place + len(number) + len(tab), len(text) - 1

    @property
    def missing(self) -> list[int]:
        """Numbers of the questions that have no answer yet, or an error in its place when the run began."""
        return [number for number, state in zip(self._numbers, self._state.tolist(), strict=True) if state != _ANSWERED]

    @property
    def num_failed(self) -> int:
        """Questions whose line says an error."""
        return int((self._state == _FAILED).sum())

    def add(self, lines: Mapping[int, Mapping[str, Any]]) -> None:
        """Keeps answers, by number; when this returns they are on the disk.

        Raises:
            UserError: the disk is full.
        """
        encoded = [b"%d\t%s\n" % (number, encode_line(line)) for number, line in lines.items()]
        with write_errors(f"'{self.path}'"):
            try:
                _write_all(self._descriptor, b"".join(encoded))
                os.fsync(self._descriptor)
            except OSError:
                # a batch is there whole or not at all, also on a disk that fills up while it is written
                os.ftruncate(self._descriptor, self._size)
                raise
        for line in encoded:
            self._note(line, self._size)
            self._size += len(line)

    def finish(self) -> None:
        """Writes the answers in order to their place.

        Raises:
            UserError: a question has no line, or the disk is full.
        """
        if (self._state == _MISSING).any():
            raise UserError(f"{int((self._state == _MISSING).sum())} questions of {self.path} have no answer yet")
        with write_errors(f"'{self.path}'"):
            # first the whole file in its place, then the partial one goes: a kill in between loses nothing
            write_lines(self.path, self.lines())
            self._partial.unlink()
            self._lock.close()

    def lines(self) -> Iterator[bytes]:
        """The lines in the questions' order, without line ends."""
        for start, length in self._places.tolist():
            yield os.pread(self._descriptor, length, start)


def lock_of(path: Path, wait: bool = False) -> Locked:
    """The lock of an answers file, whose content is its header.

    Args:
        wait: until no other process has it.

    Raises:
        UserError: another process has it.
    """
    header = beside(path, "run.json")
    what = f"'{path}' ({header.name}, what it is made with)"
    return Locked(header, what, lambda _: f"another process writes {path}; wait for it", wait)


def _claim(
    lock: Locked, path: Path, header: Mapping[str, Any], asked: Asked | None, fresh: bool
) -> dict[str, Any] | None:
    """Writes the header of a new file, or compares it with that of an existing file, which is returned."""
    # fresh: nothing of an earlier run -> the header is written;  else -> it is compared, and the run resumes
    if fresh:
        lock.write(dict(header) | ({} if asked is None else {IMAGES: asked.digests}))
        return None
    found = lock.read()
    if not isinstance(found, dict):
        raise UserError(f"{path} exists and was not written by this command; choose another name, or --overwrite")
    changed = compare_headers(found, header)
    if changed:
        raise UserError(
            f"{path} was begun with other arguments: {'; '.join(changed)}. Run with those to resume, choose another "
            "--output, or begin again with --overwrite"
        )
    return found


def whole_lines(path: Path, lines: Iterable[bytes], ids: Sequence[Any]) -> list[bytes]:
    """The lines of a file of answers before the first that is cut short or damaged, with a warning where there is one.

    Args:
        path: of the answers.
        ids: of the questions whose lines there should be, see `read_line`.
    """
    # From the first bad line on nothing is kept: where lines are lost, later ones may be of other questions.
    pairs = itertools.takewhile(lambda pair: read_line(*pair) is not None, zip(lines, ids, strict=False))
    kept = [line for line, _ in pairs]
    if len(kept) < len(ids):
        logger.warning(
            "%s was cut short or damaged after line %d of %d: the questions from there on are asked again",
            path,
            len(kept),
            len(ids),
        )
    return kept


def is_complete(path: Path, header: Mapping[str, Any]) -> bool:
    """Whether an answer file is finished and was made with a header."""
    if not path.exists() or beside(path, "partial").exists():
        return False
    found = read_header(path)
    return bool(found) and not compare_headers(found, header)


def read_header(path: Path) -> dict[str, Any]:
    """What an answer file was made with; {} where that is not known."""
    try:
        found = json.loads(beside(path, "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def beside(path: Path, suffix: str) -> Path:
    """A file beside another: `answers.jsonl.partial`."""
    return path.with_name(f"{path.name}.{suffix}")


def encode_line(line: Mapping[str, Any]) -> bytes:
    """One JSON object as a line without its end."""
    return json.dumps(dict(line), ensure_ascii=False).encode("utf-8", "backslashreplace")


def write_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Writes a file of lines in one step: it is there whole, or as it was.  What killed processes left is removed."""
    remove_leftovers(path.parent)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.writelines(line + b"\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def _lines(path: Path) -> Iterator[bytes]:
    """Its lines without their ends; the last one, cut short, as it is."""
    with path.open("rb") as file:
        for line in file:
            yield line[:-1] if line.endswith(b"\n") else line


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        # a write may be short, on a full disk or after a signal
        view = view[os.write(descriptor, view) :]
