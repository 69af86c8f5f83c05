"""A file of questions -> a file of answers: resumes after any stop, and says what failed.

Lines are those of LLaVA's `model_vqa`, with a question's reference beside its answer.  Knows no command line.

Source: haotian-liu/LLaVA llava/eval/model_vqa.py, model_vqa_loader.py (commit c121f04); identities as those of
shortuuid.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paddlemix.checkpoints.model_identity import file_identity
from paddlemix.checkpoints.pretrained import Pretrained
from paddlemix.datasets.records.record_file import RecordFile, open_records
from paddlemix.datasets.sample_lengths import measure_lengths
from paddlemix.errors import UserError
from paddlemix.generation.answer_file import AnswerFile, lock_of, read_header
from paddlemix.generation.answer_header import VERSION
from paddlemix.generation.answer_outputs import AnswerInputs, check_answer_outputs
from paddlemix.generation.joined_shares import count_failed, join_shares, read_joined, share_paths
from paddlemix.generation.predict import Answer, answer_batches, batches_by_length, processor_for
from paddlemix.generation.predict_job import MODEL_FILES, PredictJob, model_id
from paddlemix.generation.questions import QuestionList, QuestionShare
from paddlemix.identity import differences
from paddlemix.launch.worker import report_begin
from paddlemix.progress_bar import ProgressBar

_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"  # shortuuid's: no two look alike
_BYTE_BY_BYTE = 2  # the version of headers that knew declared files by their bytes
_ID_LENGTH = 22  # of its digits hold 128 bits


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
        load: returns the model; called only where there is something to ask, and before earlier answers are forgotten.

    Returns:
        What was done.  A question that cannot be asked is a line with an `error`; the next run asks it again.

    Raises:
        MissingFileError, UserError: the input, the model or an argument cannot be used, the output cannot be written or
            was begun with other arguments.
    """
    inputs = AnswerInputs(model=job.model, base=job.base, input=job.input, image_root=job.image_root)
    check_answer_outputs(job.output, share_paths(job) if job.chunk.joined else (), inputs, job.overwrite)
    records = open_records(job.input, job.form)
    numbers, header = job.chunk.numbers(len(records)), job.header(records)
    if job.batch_size < 1 or job.workers < 1:
        raise UserError(f"batch-size {job.batch_size} and workers {job.workers} must be at least 1")
    path, earlier = job.output, None
    for place in (path, *(share_paths(job) if job.chunk.joined else ())):
        _renew_header(place, job, header)
    if job.chunk.joined:
        path = share_paths(job)[job.chunk.index]
        earlier = read_joined(job, header, records)
        if earlier is not None and len(earlier) == len(records) and not count_failed(earlier):
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
    if not job.chunk.joined:
        return outcome
    lines = join_shares(job, header)
    return outcome if lines is None else replace(outcome, failed=count_failed(lines), complete=True)


def _renew_header(path: Path, job: PredictJob, header: dict[str, Any]) -> None:
    """Writes the header of an earlier version as this one does, where the model's files are those that it names.

    Raises:
        UserError: they are not, and nobody can tell any more whether one of them was only written otherwise.
    """
    found = read_header(path)
    if job.overwrite or found.get(VERSION) != _BYTE_BY_BYTE:
        return
    then, now = found.get(MODEL_FILES), file_identity(job.model, job.base)
    if not isinstance(then, dict) or then != now:
        what = "; ".join(differences(then, now)) if isinstance(then, dict) else "its header is damaged"
        raise UserError(
            f"{path} was begun by an earlier version of this package, which compared a model's files byte by byte, and "
            f"they are not the same now ({what}). Put them back to resume, choose another --output, or begin again "
            "with --overwrite"
        )
    lock = lock_of(path)
    try:
        lock.write({**found, VERSION: header[VERSION], MODEL_FILES: header[MODEL_FILES]})
    finally:
        lock.close()


def _ask(job: PredictJob, loaded: Pretrained, records: RecordFile, answers: AnswerFile, missing: list[int]) -> int:
    """Asks the missing questions; returns how many have an answer now."""
    processor = processor_for(loaded, job.template)
    questions = QuestionList(records, processor, job.question_settings())
    numbers, wanted = job.chunk.numbers(len(records)), set(missing)
    # of all questions, not of the missing ones: batches must be the same when a run is resumed
    lengths = measure_lengths(QuestionShare(questions, numbers), job.workers if job.workers > 1 else 0)[:, 0]
    batches = [[numbers[place] for place in batch] for batch in batches_by_length(lengths, job.batch_size)]
    chosen = [batch for batch in batches if not wanted.isdisjoint(batch)]
    if not job.settings.temperature:  # draws depend on the whole batch, greedy answers do not
        kept = [number for batch in chosen for number in batch if number in wanted]
        chosen = [kept[start : start + job.batch_size] for start in range(0, len(kept), job.batch_size)]
    name = model_id(job.model)
    # one bar on a shared terminal
    silent = job.chunk.joined and job.chunk.index > 0
    report_begin()
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
