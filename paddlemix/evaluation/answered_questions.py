"""Predictions -> questions with their answers: read, matched, and complete, or one clear error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from paddlemix.errors import MissingFileError, UserError
from paddlemix.evaluation.prepared import Prepared
from paddlemix.evaluation.scoring.answered import Answered
from paddlemix.generation.answer_line import read_line
from paddlemix.identity import listed

Line = dict[str, Any]


def answered_questions(prepared: Prepared) -> list[Answered]:
    """The questions of a benchmark with the answers of its file of predictions, in the questions' order.

    Raises:
        MissingFileError: there are no predictions.
        UserError: a line is damaged, or questions have no answer or more than one.
    """
    lines = _read(prepared)
    failed = [line for line in lines if "error" in line]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise UserError(
            f"{prepared.benchmark.name}: {len(failed)} of {len(lines)} questions could not be asked, so that there is "
            f"no score: question {failed[0]['question_id']!r}: {failed[0]['error']}{more}. Mend this and run the same "
            "command again; only these are asked"
        )
    return [
        question.answered(line) for question, line in zip(prepared.questions, _matched(prepared, lines), strict=True)
    ]


def _read(prepared: Prepared) -> list[Line]:
    path = prepared.predictions
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise MissingFileError(f"'{path}' does not exist; predict first, without --score-only") from None
    except OSError as error:
        raise MissingFileError(f"'{path}' cannot be read: {error.strerror}") from error
    lines = []
    for number, text in enumerate(content.splitlines(), 1):
        line = read_line(text)
        if line is None:
            raise UserError(f"'{path}' line {number} is not a prediction, or is cut short")
        lines.append(line)
    return lines


def _matched(prepared: Prepared, lines: Sequence[Line]) -> Sequence[Line]:
    """The lines in the order of the questions."""
    questions, path = prepared.questions, prepared.predictions
    # our own file has the questions' order; others' shares may have been put together in another one
    if [str(line["question_id"]) for line in lines] == [str(one.question_id) for one in questions]:
        return lines
    by_prompt = prepared.data.ids_repeat
    keys = [(str(line["question_id"]), line["prompt"].strip() if by_prompt else "") for line in lines]
    wanted = [(str(one.question_id), one.text.strip() if by_prompt else "") for one in questions]
    twice = [key[0] for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise UserError(f"'{path}' has more than one answer to {len(twice)} questions: {listed(twice)}")
    found = dict(zip(keys, lines, strict=True))
    lost = [key[0] for key in wanted if key not in found]
    if lost:
        raise UserError(f"'{path}' has no answer to {len(lost)} of {len(wanted)} questions: {listed(lost)}")
    # more answers than questions: of a whole benchmark, of which --limit scores a part
    return [found[key] for key in wanted]
