"""Answers to many questions: in batches of like length, images decoded ahead, each answer in its question's place.

    answers = predict("llava-v1.5-7b", [{"image": "a.png", "text": "What is this?"}])
    print(answers[0].text)

A question that cannot be asked becomes an answer with an error and stops nothing.  Knows no answer file.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from paddlemix.checkpoints.load import load_pretrained
from paddlemix.checkpoints.pretrained import Pretrained
from paddlemix.errors import UserError
from paddlemix.generation.ending import ending_of
from paddlemix.generation.generate import answer_budget, generate
from paddlemix.generation.questions import EncodedQuestion, QuestionList, QuestionSettings
from paddlemix.generation.sampling import GenerationSettings
from paddlemix.models.llava import LlavaModel
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.processors.text.template import Template
from paddlemix.sample import Sample

_AHEAD = 2  # batches whose images are decoded before they are asked for


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said.

    Args:
        prompt: the question's words, see `EncodedQuestion.text`; "" where the question could not be read.
        text: the answer; "" where there is none.
        reference: the right answer, where the question's record has one.
        error: why the question could not be asked.
    """

    prompt: str
    text: str
    reference: str | None = None
    error: str | None = None


def predict(
    model: Pretrained | str | Path,
    questions: Sequence[Mapping[str, Any] | Sample],
    settings: GenerationSettings | None = None,
    *,
    batch_size: int = 8,
    template: Template | None = None,
    image_root: str | None = None,
) -> list[Answer]:
    """Answers questions.

    Args:
        model: what `load_pretrained` returns, or its argument.
        questions: records such as `{"image": "a.png", "text": "What is this?"}` or of a training form, of which the
            last question is asked, see `parse.parse_question`; or Samples.
        settings: length and sampling of answers.
        batch_size: questions that are answered together, >= 1.
        template: instead of the one stored with the checkpoint.
        image_root: folder that relative image paths start from; None for the working directory.

    Returns:
        One answer for each question, in their order.

    Raises:
        MissingFileError, UserError: the model cannot be used, or `batch_size` is below 1.  What is wrong with a
            question is said in its answer.
    """
    loaded = model if isinstance(model, Pretrained) else load_pretrained(model)
    processor = processor_for(loaded, template)
    asked = QuestionList(questions, processor, QuestionSettings(image_root=image_root))
    lengths = np.array([asked.measure(index) for index in range(len(asked))]).reshape(-1, 2)[:, 0]
    found: dict[int, Answer] = {}
    batches = batches_by_length(lengths, batch_size)
    for answers in answer_batches(loaded.model, asked, processor, batches, settings or GenerationSettings()):
        found.update(answers)
    return [found[index] for index in range(len(asked))]


def processor_for(loaded: Pretrained, template: Template | None) -> LlavaProcessor:
    """A model's processor, with another template where one is given.

    Raises:
        UserError: the checkpoint has no tokenizer.
    """
    if loaded.processor is None:
        raise UserError(f"{loaded.directory} has no tokenizer files, so it cannot be asked; copy them from its base")
    return loaded.processor if template is None else replace(loaded.processor, template=template)


def batches_by_length(lengths: np.ndarray, batch_size: int) -> list[list[int]]:
    """Indices of questions, batch by batch, the longest first, so that little is padded and what needs most memory
    comes at once.

    Args:
        lengths: int [n], tokens.
        batch_size: >= 1.

    Raises:
        UserError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} must be at least 1")
    # the longest first: if memory is too small, that shows in the first batch and not after hours
    order = np.argsort(-lengths, kind="stable").tolist()
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def answer_batches(
    model: LlavaModel,
    questions: QuestionList,
    processor: LlavaProcessor,
    batches: Iterable[Sequence[int]],
    settings: GenerationSettings,
    workers: int = 1,
) -> Iterator[dict[int, Answer]]:
    """Answers of one batch after the other, by index.

    Args:
        model: in evaluation mode.
        questions: encoded with `processor`.
        batches: indices of questions.
        settings: of the seed and a batch's first index comes the seed of its draws, so that they do not depend on what
            was answered before.
        workers: threads that decode images, >= 1.
    """
    ending = ending_of(processor, settings.stop)
    is_ended = ending.reached(processor.tokenizer)
    for batch, encoded in _encoded_ahead(questions, batches, workers):
        encoded = [_checked(model, item) for item in encoded]
        asked = [item for item in encoded if isinstance(item, EncodedQuestion)]
        # resuming asks fewer batches, and the same batch must draw the same
        seeded = replace(settings, seed=settings.seed + batch[0])
        tokens = iter(generate(model, [item.prompt for item in asked], seeded, ending.ids, is_ended))
        answers = {}
        for index, item in zip(batch, encoded, strict=True):
            if isinstance(item, UserError):
                answers[index] = Answer(prompt=questions.words(index), text="", error=str(item))
                continue
            text = ending.cut(processor.tokenizer.decode(next(tokens)).lstrip())[0].strip()
            answers[index] = Answer(prompt=item.text, text=text, reference=item.reference)
        yield answers


def _checked(model: LlavaModel, item: EncodedQuestion | UserError) -> EncodedQuestion | UserError:
    """The question, or why this model cannot be asked it."""
    if isinstance(item, UserError):
        return item
    if item.prompt.num_tiles and model.config.vision is None:
        return UserError("the question has an image, but the model has no vision tower")
    try:
        # asked one by one: one long question must not fail its whole batch
        answer_budget(model, len(item.prompt.input_ids), 1)
    except UserError as error:
        return error
    return item


def _encoded_ahead(
    questions: QuestionList, batches: Iterable[Sequence[int]], workers: int
) -> Iterator[tuple[Sequence[int], list[EncodedQuestion | UserError]]]:
    """Batches in order with their questions encoded by threads, or the errors in their place."""

    def encode(index: int) -> EncodedQuestion | UserError:
        try:
            return questions.encode(index)
        except UserError as error:
            return error

    ready: deque[tuple[Sequence[int], list[Future[EncodedQuestion | UserError]]]] = deque()
    pool = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="decode")
    try:
        for batch in batches:
            # threads: Pillow and numpy release the interpreter while they decode
            ready.append((batch, [pool.submit(encode, index) for index in batch]))
            if len(ready) > _AHEAD:
                first, futures = ready.popleft()
                yield first, [future.result() for future in futures]
        while ready:
            first, futures = ready.popleft()
            yield first, [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
