"""What answering a file of questions is asked to do: model, questions, output, settings, and the share of a process.

Knows what the answers depend on, see `PredictJob.header`; asks nothing.

Source: haotian-liu/LLaVA llava/eval/model_vqa.py, model_vqa_loader.py (commit c121f04).
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from paddlemix.checkpoints.model_identity import model_identity
from paddlemix.datasets.records.record_file import RecordFile
from paddlemix.errors import UserError
from paddlemix.generation.answer_header import QUESTIONS, VERSION, Asked
from paddlemix.generation.questions import QuestionSettings, image_files, question_names
from paddlemix.generation.sampling import GenerationSettings
from paddlemix.identity import file_digests, text_digest
from paddlemix.processors.text.template import Template

_SHORT = 16  # digits of a picture's digest that are kept for each question
MODEL_FILES = "model files"  # in the header: what the model computes with


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
        # as LLaVA's `get_chunk`: the same questions for the same chunk
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
        """All that the answers depend on but pictures.  Places do not count: after a move or a copy a run resumes."""
        return {
            VERSION: 3,
            "model": model_id(self.model),
            MODEL_FILES: model_identity(self.model, self.base),
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
            # one picture that cannot be read makes the whole digest unknown
            return text_digest(*found)[:_SHORT] if found and None not in found else ""

        return Asked(
            [question_names(records, number)[0] for number in numbers],
            [digest(each) for each in paths],
            lambda places: [path for place in places for path in paths[place]],
        )

    def question_settings(self) -> QuestionSettings:
        """How records become questions."""
        return QuestionSettings(name=self.input, image_root=self.image_root, form=self.form, suffix=self.suffix)


def model_id(model: str) -> str:
    """What LLaVA calls a model: the last part of its path; a checkpoint's with the name of its run before it."""
    parts = Path(os.path.abspath(model)).parts if os.path.isdir(model) else Path(model).parts
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]
