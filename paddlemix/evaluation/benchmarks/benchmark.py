"""What a benchmark is: a reader of its folder, what that returns, and how its answers are scored.

Knows no model, and of benchmarks only what all of them have; `known_benchmarks.py` is the table of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from paddlemix.errors import UserError, cut
from paddlemix.evaluation.scoring.answered import LLAVA, LMMS_EVAL, Answered, Score

Id = str | int
Answers = Mapping[Id, str]
Scorer = Callable[[Sequence[Answered], str], Score]

SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"
_SHOWN = 60  # characters of a question that an error repeats


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question of a benchmark, in the words in which the model is asked.

    Args:
        question_id: as the benchmark has it; its answers carry it.
        text: the whole question with what form its answer shall have.
        images: paths below `BenchmarkData.image_root`.
        category: the part of the benchmark that it counts for, "" for none.
        record: the benchmark's own record: what its scorer needs.
        unit: questions of one unit count only together, e.g. the rotations of one; None for a question by itself.
        own_record: asked as it is, in place of `text` and `images`: a conversation with what precedes the question.
    """

    question_id: Id
    text: str
    images: tuple[str, ...] = ()
    category: str = ""
    record: Mapping[str, Any] = field(default_factory=dict)
    unit: Hashable = None
    own_record: Mapping[str, Any] | None = None

    def line(self) -> Mapping[str, Any]:
        """The question as a record of LLaVA's question files."""
        if self.own_record is not None:
            return self.own_record
        images: dict[str, Any] = {}
        if self.images:
            images = {"image": self.images[0] if len(self.images) == 1 else list(self.images)}
        return {"question_id": self.question_id, **images, "text": self.text, "category": self.category}

    def answered(self, line: Mapping[str, Any]) -> Answered:
        """The question with its answer, as scorers read it.

        Args:
            line: of the predictions.
        """
        record = self.record
        # the reference of a conversation is its last answer, whose boxes are written as the model's are
        if self.own_record is not None and not record and "reference" in line:
            record = {"reference": line["reference"]}
        return Answered(
            question_id=self.question_id,
            text=line["text"],
            prompt=line["prompt"],
            category=self.category,
            image=self.images[0] if self.images else None,
            record=record,
        )


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A file for the server or the script that scores.

    Args:
        name: of the file.
        write: writes it to a path, out of the answers by question_id.
        module: of an optional package that this needs; "" for none.
    """

    name: str
    write: Callable[[Path, Answers], None]
    module: str = ""


@dataclass(frozen=True, kw_only=True)
class BenchmarkData:
    """What a folder of a benchmark holds.

    Args:
        questions: in the order of its file.
        files: that were read, for their checksums.
        image_root: the folder of the pictures; None where `pictures` has them, or the working directory.
        pictures: of a table that holds its pictures itself: name -> content in base64.
        has_references: whether the right answers are there; those of test sets are with a server.
        submission: the file for a server, where there is one.
        ids_repeat: whether several questions have one id, as those of one picture do.
    """

    questions: Sequence[Question]
    files: Sequence[Path]
    image_root: Path | None = None
    pictures: Mapping[str, str] = field(default_factory=dict)
    has_references: bool = True
    submission: Submission | None = None
    ids_repeat: bool = False


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is read of a benchmark's data.

    Args:
        folder: of the benchmark.
        protocol: whose prompts the questions have.
    """

    folder: Path
    protocol: str = LLAVA


Reader = Callable[[Request], BenchmarkData]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark.

    Args:
        name: as it is typed.
        title: as it is written.
        folders: names of its folder below the data root; LLaVA's comes first.
        question_files: the file of its questions below its folder: of several names the first that is there.
        read: returns the data of a folder.
        score: returns the score; None where a judge gives it, or only a server.
        judged: which kind of judge; None for a benchmark without one.
        published_questions: number of questions of the published version, for a note beside the score.
        max_new_tokens: most tokens of an answer, by protocol.
        headline: the metric that papers print.
    """

    name: str
    title: str
    folders: tuple[str, ...]
    question_files: tuple[str, ...]
    read: Reader
    score: Scorer | None
    judged: Literal["comparisons", "grades"] | None = None
    published_questions: tuple[int, ...]
    max_new_tokens: Mapping[str, int] = field(default_factory=lambda: {LLAVA: 1024, LMMS_EVAL: 1024})
    headline: str = "accuracy"


def check_questions(data: BenchmarkData, name: str) -> None:
    """Whether each question is there once.

    Raises:
        UserError: there is none, or two are the same.
    """
    if not data.questions:
        raise UserError(f"{name}: {data.files[0]} has no question")
    seen: set[Hashable] = set()
    for question in data.questions:
        key = (question.question_id, question.text) if data.ids_repeat else question.question_id
        if key in seen:
            raise UserError(
                f"{name}: question {question.question_id!r} is more than once in {data.files[0]} "
                f"('{cut(' '.join(question.text.split()), _SHOWN)}'); each question must be there once"
            )
        seen.add(key)


def first_questions(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """The first questions, with all others of the units that they belong to.

    Args:
        limit: how many, >= 1; None for all.

    Raises:
        UserError: `limit` is below 1.
    """
    if limit is None:
        return list(questions)
    if limit < 1:
        raise UserError(f"limit {limit} must be at least 1")
    first = questions[:limit]
    units = {question.unit for question in first if question.unit is not None}
    # their order stays that of the file: scorers and resumed runs rely on it
    return [*first, *(question for question in questions[limit:] if question.unit in units)]
