"""A benchmark made ready for a model: its questions as a file that `predict_file` reads, and what they were made of.

    OUTPUT/NAME/questions.jsonl       what is asked, in LLaVA's form
    OUTPUT/NAME/images/               the pictures of a table that holds them itself
    OUTPUT/NAME/made_with.json        protocol, limit, checksums of the data, template, versions
    OUTPUT/NAME/predictions.jsonl     the answers, see `generation/answer_file.py`

Knows no model.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from paddlemix import __version__
from paddlemix.cache import replacing
from paddlemix.errors import UserError
from paddlemix.evaluation.benchmarks.benchmark import (
    Benchmark,
    BenchmarkData,
    Question,
    Request,
    check_questions,
    first_questions,
)
from paddlemix.evaluation.benchmarks.benchmark_files import check_pictures
from paddlemix.evaluation.scoring.optional import import_extra
from paddlemix.file_locks import one_at_a_time
from paddlemix.identity import file_digest
from paddlemix.json_files import parse_json, read_text
from paddlemix.locks import write_errors
from paddlemix.outputs import Needed, Output, check_output

PREDICTIONS, MADE_WITH = "predictions.jsonl", "made_with.json"
_QUESTIONS, _IMAGES, _LOCK = "questions.jsonl", "images", ".lock"
_PACKAGES = ("paddlepaddle", "paddlepaddle-gpu", "numpy", "Pillow", "tokenizers")
# What decides about the questions: answers to others are not scored with them.
_COMPARED = ("protocol", "limit", "data")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A benchmark whose data has been read.

    Args:
        benchmark: which.
        protocol: whose prompts the questions have.
        limit: of questions, None for all.
        data: as it was read.
        questions: that are asked.
        folder: of its results.
    """

    benchmark: Benchmark
    protocol: str
    limit: int | None
    data: BenchmarkData
    questions: Sequence[Question]
    folder: Path

    @property
    def predictions(self) -> Path:
        """The file of answers."""
        return self.folder / PREDICTIONS

    @property
    def questions_file(self) -> Path:
        """The file of questions."""
        return self.folder / _QUESTIONS

    @property
    def image_root(self) -> str | None:
        """The folder that the pictures' names start from; None for the working directory."""
        if self.data.pictures:
            return str(self.folder / _IMAGES)
        return None if self.data.image_root is None else str(self.data.image_root)

    def made_with(self, template: str | None = None) -> dict[str, Any]:
        """What the answers are made with, beside what their own file says of itself (model, settings).

        Args:
            template: its name, once it is known.
        """
        # by the last two parts of a path: the same data elsewhere is the same data
        names = ("/".join(path.parts[-2:]) for path in self.data.files)
        return {
            "benchmark": self.benchmark.name,
            "protocol": self.protocol,
            "limit": self.limit,
            "data": dict(zip(names, map(file_digest, self.data.files), strict=True)),
            "first_prompt": self.questions[0].text,
            "template": template,
            "versions": _versions(),
        }


def prepare(benchmark: Benchmark, request: Request, limit: int | None, folder: Path) -> Prepared:
    """Reads a benchmark's data.

    Args:
        request: where, and whose prompts.
        limit: the first questions alone.
        folder: of its results; nothing is written yet.

    Raises:
        MissingFileError, UserError: a file is missing or broken, questions are missing or repeated, or the results
            would come where the data is.
    """
    data = benchmark.read(request)
    check_questions(data, benchmark.name)
    needed = [Needed(f"the data of {benchmark.name}", path, "file") for path in data.files]
    if data.image_root is not None:
        needed.append(Needed(f"the pictures of {benchmark.name}", data.image_root, "pictures"))
    check_output(Output("--output", folder, "folder"), needed)
    # Before hours of predictions; where we score ourselves the file is only an addition.
    if data.submission is not None and data.submission.module and not data.has_references:
        import_extra(data.submission.module, f"the file for {benchmark.title}'s server")
    return Prepared(
        benchmark=benchmark,
        protocol=request.protocol,
        limit=limit,
        data=data,
        questions=first_questions(data.questions, limit),
        folder=folder,
    )


def write_questions(prepared: Prepared, overwrite: bool) -> None:
    """Writes what a model is asked, where it is not there yet; several processes may do so at once.

    Raises:
        MissingFileError, UserError: a picture is missing or cannot be decoded, there are answers to other questions, or
            nothing can be written.
    """
    data, folder = prepared.data, prepared.folder
    used = {name for question in prepared.questions for name in question.images}
    if not data.pictures and prepared.questions[0].own_record is None:
        check_pictures(data.image_root, [name for one in prepared.questions for name in one.images], folder.name)
    with write_errors(f"'{folder}'"):
        folder.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(folder / _LOCK):
            if not overwrite and prepared.predictions.exists():
                check_made_with(prepared)
            if data.pictures:
                _write_pictures(folder / _IMAGES, {name: data.pictures[name] for name in sorted(used)})
            lines = (json.dumps(dict(question.line()), ensure_ascii=False) + "\n" for question in prepared.questions)
            _write_if_new(prepared.questions_file, "".join(lines).encode("utf-8", "backslashreplace"))
            if overwrite or not (folder / MADE_WITH).exists():
                write_made_with(prepared, None)


def check_made_with(prepared: Prepared) -> None:
    """Whether answers that are there are to these questions; answers of another program, which say nothing, are.

    Raises:
        UserError: they are not; says what differs.
    """
    found, wanted = read_made_with(prepared), prepared.made_with()
    wrong = []
    for name in _COMPARED if found else ():
        then, now = found.get(name), wanted[name]
        if then != now:
            wrong.append(name if name == "data" else f"{name} {json.dumps(then)} (now {json.dumps(now)})")
    if wrong:
        raise UserError(
            f"{prepared.predictions} was made with other {', '.join(wrong)}; give the same to resume, choose another "
            "--output, or begin again with --overwrite"
        )


def read_made_with(prepared: Prepared) -> dict[str, Any]:
    """What `made_with.json` says; {} where it is not there.

    Raises:
        UserError: it is damaged.
    """
    path = prepared.folder / MADE_WITH
    if not path.exists():
        return {}
    try:
        found = parse_json(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"'{path}' is damaged ({error}); remove it together with {PREDICTIONS}") from error
    return found if isinstance(found, dict) else {}


def write_made_with(prepared: Prepared, template: str | None) -> None:
    """Writes `made_with.json`."""
    with replacing(prepared.folder / MADE_WITH) as temporary:
        text = json.dumps(prepared.made_with(template), ensure_ascii=False, indent=2)
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def _write_if_new(path: Path, content: bytes) -> None:
    # a file that is rewritten has changed for whoever reads it at the moment
    if not path.exists() or path.read_bytes() != content:
        with replacing(path) as temporary:
            temporary.write_bytes(content)


def _write_pictures(folder: Path, pictures: Mapping[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    there = set(os.listdir(folder))
    for name, content in pictures.items():
        if name in there:
            continue
        try:
            decoded = base64.b64decode(content, validate=True)
        except (binascii.Error, ValueError) as error:
            raise UserError(f"the picture '{name}' in the table is not base64: {error}") from error
        with replacing(folder / name) as temporary:
            temporary.write_bytes(decoded)


def _versions() -> dict[str, str]:
    found = {"paddlemix": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # one of the two builds of paddle
    return found
