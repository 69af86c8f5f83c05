"""Asks a model the questions of a held-out list and compares the answers exactly."""

from __future__ import annotations

from pathlib import Path

from paddlemix.checkpoints.load import load_pretrained
from paddlemix.datasets.forms.parse import parse_record
from paddlemix.datasets.images.decode import load_image
from paddlemix.datasets.records.record_file import read_records
from paddlemix.demo.results import Verdict
from paddlemix.errors import UserError
from paddlemix.generation.ending import ending_of
from paddlemix.generation.generate import generate
from paddlemix.generation.sampling import GenerationSettings

# Bounds the memory of pictures and key/value cache.
_BATCH_SIZE = 60
_MAX_NEW_TOKENS = 32


def answer_questions(model_directory: Path, questions: Path, image_root: Path) -> list[Verdict]:
    """Answers the first question of every record, greedily.

    Args:
        model_directory: a model or an adapter directory.
        questions: JSON list of records; the answer of a record's first pair is the expected one.
        image_root: folder of the records' image paths.
    """
    loaded = load_pretrained(model_directory)
    processor = loaded.processor
    if processor is None:
        raise UserError(f"{model_directory} has no tokenizer files, so it cannot be questioned")
    samples = [
        parse_record(record, f"{questions} record {number}", image_root)
        for number, record in enumerate(read_records(questions))
    ]
    settings = GenerationSettings(max_new_tokens=_MAX_NEW_TOKENS)
    verdicts = []
    for start in range(0, len(samples), _BATCH_SIZE):
        chosen = samples[start : start + _BATCH_SIZE]
        prompts = [
            # the question alone: the second message is the expected answer
            processor.encode_prompt(sample.messages[:1], [load_image(path) for path in sample.images])
            for sample in chosen
        ]
        answers = generate(loaded.model, prompts, settings, ending_of(processor).ids)
        for sample, answer in zip(chosen, answers, strict=True):
            verdicts.append(
                Verdict(
                    image_path=Path(sample.images[0]),
                    question=sample.messages[0].text.strip(),
                    answer=processor.tokenizer.decode(answer).strip(),
                    expected=sample.messages[1].text,
                )
            )
    return verdicts
