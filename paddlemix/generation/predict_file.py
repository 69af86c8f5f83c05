"""A file of questions -> a file of answers: shares the work, goes on after any stop, says what failed.

Lines are those of LLaVA's `model_vqa`; a question's reference stands beside its answer.  Knows no command line.

Source: haotian-liu/LLaVA llava/eval/model_vqa.py, model_vqa_loader.py (commit c121f04); identities as those of
shortuuid.
"""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from paddlemix.checkpoints.identity.model_identity import file_identity, model_identity
from paddlemix.checkpoints.pretrained import Pretrained
from paddlemix.datasets.records.record_file import RecordFile, open_records
from paddlemix.datasets.sample_lengths import measure_lengths
from paddlemix.errors import UserError
from paddlemix.generation.answer_file import (
    AnswerFile,
    beside,
    is_complete,
    lock_of,
    read_header,
    whole_lines,
    write_lines,
)
from paddlemix.generation.answer_header import IMAGES, QUESTIONS, VERSION, Asked, check_images, compare_headers
from paddlemix.generation.answer_outputs import AnswerInputs, check_answer_outputs
from paddlemix.generation.predict import Answer, answer_batches, batches_by_length, processor_for
from paddlemix.generation.questions import QuestionList, QuestionSettings, QuestionShare, image_files, question_names
from paddlemix.generation.sampling import GenerationSettings
from paddlemix.identity import differences, file_digests, text_digest
from paddlemix.processors.text.template import Template
from paddlemix.progress import ProgressBar

_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"  # shortuuid's: no two look alike
_SHORT = 16  # digits of a picture's digest that are kept for each question
_MODEL = "model files"  # in the header: what the model computes with
_BYTE_BY_BYTE = 2  # the version of headers that knew declared files by their bytes
_ID_LENGTH = 22  # of its digits hold 128 bits


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """The share of one process: questions in the file's order, as LLaVA cuts them.

    Args:
        index: 0 .. count - 1.
        count: >= 1.
        joined: whether the processes write one file together; else each has an output of its own.
    """

    index: int = 0
    count: int = 1
    joined: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise UserError(f"chunk-idx {self.index} must be from 0 to num-chunks - 1 ({self.count - 1})")

    def numbers(self, total: int) -> range:
        """The questions of this share, of `total`; the last shares may be smaller or empty."""
        size = math.ceil(total / self.count)
        return range(min(self.index * size, total), min((self.index + 1) * size, total))


@dataclass(frozen=True, kw_only=True)
class PredictJob:
    """What is asked, and how.

    Args:
        model: directory or name, as the user gave it.
        input: the questions: JSON array or JSON Lines, path or http(s) address.
        output: the answers, JSON Lines.
        base: an adapter's base model, where it is not at the place that the adapter names.
        image_root, form, suffix: see `QuestionSettings`.
        template: instead of the one stored with the checkpoint.
        settings: length and sampling of answers.
        dtype, quantize: as the model is loaded; answers depend on them.
        batch_size: questions that are answered together, >= 1.
        workers: threads that decode images; above 1 also processes that measure many questions.
        chunk: the share of this process.
        overwrite: forget earlier answers.
    """

    model: str
    input: str
    output: Path
    base: str | None = None
    image_root: str | None = None
    form: str | None = None
    suffix: str = ""
    template: Template | None = None
    settings: GenerationSettings = field(default_factory=GenerationSettings)
    dtype: str = "float32"
    quantize: str | None = None
    batch_size: int = 8
    workers: int = 1
    chunk: Chunk = field(default_factory=Chunk)
    overwrite: bool = False

    def header(self, records: RecordFile) -> dict[str, Any]:
        """All that the answers depend on but pictures.  Places do not count: what was moved or copied may go on."""
        return {
            VERSION: 3,
            "model": model_id(self.model),
            _MODEL: model_identity(self.model, self.base),
            QUESTIONS: records.content_digest,
            "form": self.form,
            "added line": self.suffix or None,
            "conv-mode": None if self.template is None else self.template.name,
            "dtype": self.dtype,
            "quantize": self.quantize,
            "batch-size": self.batch_size if self.settings.temperature else None,  # greedy answers do not depend on it
            "chunk": None if self.chunk.count == 1 else [self.chunk.index, self.chunk.count],
            **asdict(self.settings),
        }

    def asked(self, records: RecordFile, numbers: range) -> Asked:
        """Which some questions are, and what their pictures hold."""
        settings = self.question_settings()
        paths = [image_files(records, number, settings) for number in numbers]
        files = sorted({path for each in paths for path in each})
        digests = dict(zip(files, file_digests(files, "pictures"), strict=True))

        def digest(each: list[str]) -> str:
            found = [digests[path] for path in each]
            return text_digest(*found)[:_SHORT] if found and None not in found else ""

        return Asked(
            [question_names(records, number)[0] for number in numbers],
            [digest(each) for each in paths],
            lambda places: [path for place in places for path in paths[place]],
        )

    def question_settings(self) -> QuestionSettings:
        """How records become questions."""
        return QuestionSettings(name=self.input, image_root=self.image_root, form=self.form, suffix=self.suffix)


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Args:
        asked: questions that this process has asked in this run.
        answered: those of them that have an answer; the others have an error.
        total: questions of its share.
        failed: lines with an error, of its share, or of the whole file once that is complete.
        complete: whether `output` is there; otherwise other processes are still at work.
    """

    asked: int
    answered: int
    total: int
    failed: int
    complete: bool


def predict_file(job: PredictJob, load: Callable[[], Pretrained]) -> Outcome:
    """Answers the questions of a file that have no answer yet.

    Args:
        job: see `PredictJob`.
        load: gives the model; called only where there is something to ask, and before earlier answers are forgotten.

    Returns:
        What was done.  A question that cannot be asked is a line with an `error`; the next run asks it again.

    Raises:
        MissingFileError, UserError: the input, the model or an argument cannot be used, the output cannot be written or
            was begun with other arguments.
    """
    inputs = AnswerInputs(model=job.model, base=job.base, input=job.input, image_root=job.image_root)
    check_answer_outputs(job.output, _shares(job) if job.chunk.joined else (), inputs, job.overwrite)
    records = open_records(job.input, job.form)
    numbers, header = job.chunk.numbers(len(records)), job.header(records)
    if job.batch_size < 1 or job.workers < 1:
        raise UserError(f"batch-size {job.batch_size} and workers {job.workers} must be at least 1")
    path, earlier = job.output, None
    for place in (path, *(_shares(job) if job.chunk.joined else ())):
        _renew_header(place, job, header)
    if job.chunk.joined:
        path = _shares(job)[job.chunk.index]
        earlier = _joined_before(job, header, records)
        if earlier is not None and len(earlier) == len(records) and not _count_failed(earlier):
            return Outcome(0, 0, len(numbers), 0, True)
        earlier = None if earlier is None else earlier[numbers.start : numbers.stop]
    loaded = load() if job.overwrite and len(numbers) else None  # a model that cannot be asked costs no earlier answer
    answers = AnswerFile(path, header, numbers, earlier, job.overwrite, job.asked(records, numbers))
    missing = answers.missing
    try:
        answered = _ask(job, loaded or load(), records, answers, missing) if missing else 0
        failed = answers.num_failed
        answers.finish()
    except BaseException:
        answers.abandon()
        raise
    outcome = Outcome(len(missing), answered, len(numbers), failed, not job.chunk.joined)
    return _join(job, header, outcome) if job.chunk.joined else outcome


def _renew_header(path: Path, job: PredictJob, header: dict[str, Any]) -> None:
    """Writes the header of an earlier version as this one does, where the model's files are those that it names.

    Raises:
        UserError: they are not, and nobody can tell any more whether one of them was only written otherwise.
    """
    found = read_header(path)
    if job.overwrite or found.get(VERSION) != _BYTE_BY_BYTE:
        return
    then, now = found.get(_MODEL), file_identity(job.model, job.base)
    if not isinstance(then, dict) or then != now:
        what = "; ".join(differences(then, now)) if isinstance(then, dict) else "its header is damaged"
        raise UserError(
            f"{path} was begun by an earlier version of this package, which compared a model's files byte by byte, and "
            f"they are not the same now ({what}). Put them back to go on, choose another --output, or begin again with "
            "--overwrite"
        )
    lock = lock_of(path)
    try:
        lock.write({**found, VERSION: header[VERSION], _MODEL: header[_MODEL]})
    finally:
        lock.close()


def _ask(job: PredictJob, loaded: Pretrained, records: RecordFile, answers: AnswerFile, missing: list[int]) -> int:
    """Asks the missing questions; gives how many have an answer now."""
    processor = processor_for(loaded, job.template)
    questions = QuestionList(records, processor, job.question_settings())
    numbers, wanted = job.chunk.numbers(len(records)), set(missing)
    lengths = measure_lengths(QuestionShare(questions, numbers), job.workers if job.workers > 1 else 0)[:, 0]
    batches = [[numbers[place] for place in batch] for batch in batches_by_length(lengths, job.batch_size)]
    chosen = [batch for batch in batches if not wanted.isdisjoint(batch)]
    if not job.settings.temperature:  # draws depend on the whole batch, greedy answers do not
        kept = [number for batch in chosen for number in batch if number in wanted]
        chosen = [kept[start : start + job.batch_size] for start in range(0, len(kept), job.batch_size)]
    name = model_id(job.model)
    silent = job.chunk.joined and job.chunk.index > 0
    done, answered = len(numbers) - len(missing), 0
    with ProgressBar("answers", len(numbers), done, silent=silent) as bar:
        for found in answer_batches(loaded.model, questions, processor, chosen, job.settings, job.workers):
            fresh = {number: answer for number, answer in found.items() if number in wanted}
            answers.add({number: _line(questions, number, answer, name) for number, answer in fresh.items()})
            answered += sum(answer.error is None for answer in fresh.values())
            bar.update(len(fresh))
    return answered


def _line(questions: QuestionList, number: int, answer: Answer, name: str) -> dict[str, Any]:
    """One line of the output, with the keys of `answer_line`."""
    line: dict[str, Any] = {
        "question_id": questions.names(number)[0],
        "prompt": answer.prompt,
        "text": answer.text,
        "answer_id": short_id(),
        "model_id": name,
        "metadata": {},
    }
    if answer.reference is not None:
        line["reference"] = answer.reference
    if answer.error is not None:
        line["error"] = answer.error
    return line


def short_id() -> str:
    """A random identity of 22 letters and digits."""
    number, digits = uuid.uuid4().int, ""
    for _ in range(_ID_LENGTH):
        number, digit = divmod(number, len(_ALPHABET))
        digits = _ALPHABET[digit] + digits
    return digits


def model_id(model: str) -> str:
    """What LLaVA calls a model: the last part of its path; a checkpoint's with the name of its run before it."""
    parts = Path(os.path.abspath(model)).parts if os.path.isdir(model) else Path(model).parts
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


def _count_failed(lines: list[bytes]) -> int:
    return sum(b'"error": ' in line for line in lines)  # in a text its quotes would be escaped


def _shares(job: PredictJob) -> list[Path]:
    """The files of all processes that write one output together."""
    return [beside(job.output, f"{index}-of-{job.chunk.count}") for index in range(job.chunk.count)]


def _joined_before(job: PredictJob, header: dict[str, Any], records: RecordFile) -> list[bytes] | None:
    """The whole lines of an output of the same arguments; None where there is none."""
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


def _join(job: PredictJob, header: dict[str, Any], outcome: Outcome) -> Outcome:
    """Puts the shares together where this process is the last to finish."""
    paths = _shares(job)
    lock = lock_of(job.output, wait=True)
    try:
        headers = ({**header, "chunk": [index, len(paths)]} for index in range(len(paths)))
        if not all(map(is_complete, paths, headers)):
            return outcome
        lines = [line for path in paths for line in _lines(path)]
        job.output.unlink(missing_ok=True)  # so that the next header never stands beside answers of another
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
        return replace(outcome, failed=_count_failed(lines), complete=True)
    finally:
        lock.close()


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1]
