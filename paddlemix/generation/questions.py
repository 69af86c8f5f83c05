"""Questions for a finished model: records of a data file or of a list -> prompts, with their reference answers.

Of a record the last question is asked; what precedes it is its history.  Knows no model and no answer file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from paddlemix.cache import cache_key
from paddlemix.datasets.forms.dialects import is_bare_question
from paddlemix.datasets.forms.parse import parse_question
from paddlemix.datasets.images.decode import load_image
from paddlemix.datasets.images.sizes import ImageSizes
from paddlemix.datasets.images.sources import ImageSettings, files_of, is_url
from paddlemix.errors import UserError
from paddlemix.network.fetch import cached
from paddlemix.processors.images.boxes import write_boxes
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.sample import IMAGE_TOKEN, Box, Example, Message, Sample


@dataclass(frozen=True, kw_only=True)
class QuestionSettings:
    """How records become questions.

    Args:
        name: of the data file, begins every error.
        image_root: folder that relative image paths start from; None for the working directory.
        form: `name` of the data set, see `parse.parse_record`.
        images: limits.
        suffix: a line that is added to every question, e.g. what form its answer shall have.
    """

    name: str = "questions"
    image_root: str | None = None
    form: str | None = None
    images: ImageSettings = field(default_factory=ImageSettings)
    suffix: str = ""


@dataclass(frozen=True, kw_only=True)
class EncodedQuestion:
    """One question, ready for its answer.

    Args:
        prompt: encoded.
        text: its words as LLaVA's answer files have them: those of a question file as they are written; of a
            conversation a line `<image>` for each image of the question, then its words.
        reference: the right answer; None where the record has none.
    """

    prompt: Example
    text: str
    reference: str | None = None


class Records(Protocol):
    """A list of records, or a `RecordFile`."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Any: ...


class QuestionList:
    """The questions of some records; may be pickled, and threads may share it.

    Args:
        records: objects of a form that `parse.parse_question` knows, or Samples.
        processor: of the model that is asked.
        settings: see `QuestionSettings`.
    """

    def __init__(
        self,
        records: Records | Sequence[Mapping[str, Any] | Sample],
        processor: LlavaProcessor,
        settings: QuestionSettings,
    ) -> None:
        self._records, self._processor, self._settings = records, processor, settings
        self._sizes = ImageSizes(settings.images)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def fingerprint(self) -> str:
        """Differs where the file or what makes prompts of it differs; for the records of a file alone."""
        known = getattr(self._records, "fingerprint", None)
        if known is None:
            raise TypeError("a list of records has no fingerprint")
        return cache_key(
            *("questions", known, self._settings.image_root, self._settings.form, self._settings.suffix),
            *(self._processor.to_dict(), self._processor.tokenizer.fingerprint),
        )

    def sample(self, index: int) -> Sample:
        """A question as a Sample that ends with it or with its reference answer.

        Raises:
            UserError: the record is not a question; names it.
        """
        record = self._records[index]
        if isinstance(record, Sample):
            return _with_line(record, self._settings.suffix)
        source = f"{self._settings.name} record {index}"
        if not isinstance(record, dict):
            raise UserError(f"{source}: it is a {type(record).__name__}, expected a record (a dict) or a Sample")
        sample = parse_question(record, source, self._settings.image_root, self._settings.form)
        return _with_line(sample, self._settings.suffix)

    def words(self, index: int) -> str:
        """A question's words, see `EncodedQuestion`; those of `names` where it cannot be read."""
        try:
            sample = self.sample(index)
        except UserError:
            return self.names(index)[1]
        return self._words(index, _asked(sample)[-1])

    def _words(self, index: int, message: Message) -> str:
        """Source: haotian-liu/LLaVA llava/eval/model_vqa.py, model_vqa_science.py (commit c121f04)."""
        record, text = self._records[index], message.text.strip()
        if isinstance(record, dict) and is_bare_question(record, self._settings.form) and not record.get("objects"):
            return "\n".join(part for part in (record["text"].strip(), self._settings.suffix) if part)
        return f"{IMAGE_TOKEN}\n" * len(message.image_indices) + text

    def names(self, index: int) -> tuple[Any, str]:
        """See `question_names`."""
        return question_names(self._records, index)

    def measure(self, index: int) -> tuple[int, int]:
        """Tokens of a prompt and how many of them are visual, from image headers alone; an image that is not downloaded
        yet counts as a square one.  (0, 0) where the question cannot be asked."""
        try:
            sample = self.sample(index)
            sizes = [self._size(path) for path in sample.images]
            ids = self._processor.encode_text(_asked(sample), sizes, add_generation_prompt=True).input_ids
        except UserError:
            return 0, 0
        return len(ids), int((ids < 0).sum())

    def _size(self, path: str) -> tuple[int, int]:
        # measured before anything is fetched; the length only sorts questions into batches
        if is_url(path) and cached(path) is None:
            return self._processor.image_spec.tile_size, self._processor.image_spec.tile_size
        return self._sizes.get(path)

    def encode(self, index: int) -> EncodedQuestion:
        """Opens the images of a question and encodes it.

        Raises:
            MissingFileError, UserError: the question cannot be asked; names the record and the image.
        """
        sample = self.sample(index)
        try:
            images = [load_image(path, self._settings.images) for path in sample.images]
            prompt = self._processor.encode_prompt(_asked(sample), images)
            sizes = [image.size for image in images]
            messages = write_boxes(sample.messages, sizes, self._processor.image_spec)
        except UserError as error:
            raise type(error)(f"{sample.source}: {error}") from error
        # the reference answer is never part of the prompt
        answered = messages[-1].role == "assistant"
        return EncodedQuestion(
            prompt=prompt,
            text=self._words(index, messages[-2 if answered else -1]),
            reference=messages[-1].text.strip() if answered else None,
        )


@dataclass(frozen=True)
class QuestionShare:
    """Some questions of a list, as `lengths.measure_lengths` wants them.

    Args:
        questions: of a file.
        numbers: which of them.
    """

    questions: QuestionList
    numbers: range

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def fingerprint(self) -> str:
        """Differs between lists and between shares."""
        return cache_key(self.questions.fingerprint, self.numbers)

    def measure(self, index: int) -> tuple[int, int]:
        """See `QuestionList.measure`."""
        return self.questions.measure(self.numbers[index])


def question_names(records: Records, index: int) -> tuple[Any, str]:
    """What an answer says of its question even where that cannot be asked: identity, and its words as written.

    Returns:
        The record's `question_id`, else its `id`, else its number; and its `text`, else "".
    """
    try:
        record = records[index]
    except UserError:  # broken JSON
        return index, ""
    values = record if isinstance(record, dict) else {}
    # LLaVA's files have `question_id`, training files `id`
    found = (values[key] for key in ("question_id", "id") if isinstance(values.get(key), (str, int, float)))
    text = values.get("text")
    return next(found, index), text if isinstance(text, str) else ""


def image_files(records: Records, index: int, settings: QuestionSettings) -> list[str]:
    """The files of a question's pictures: of an address that of the cache, where it is there; none for `data:` URIs and
    for a record that is not a question."""
    try:
        source = f"{settings.name} record {index}"
        sample = parse_question(records[index], source, settings.image_root, settings.form)
    except UserError:
        return []
    return [file for file in files_of(sample.images) if file]


def _with_line(sample: Sample, line: str) -> Sample:
    """The question with a line of text at its end, images first where it shows one, as LLaVA writes it."""
    if not line:
        return sample
    place = len(_asked(sample)) - 1
    asked = sample.messages[place]
    # where the line goes      -> when
    # after the stripped words -> none or one image and no box, as LLaVA's evaluation files are written
    # at the very end          -> else: moving images or boxes would change what the words refer to
    content: tuple[str | int | Box, ...] = (*asked.content, f"\n{line}")
    if len(asked.image_indices) < 2 and not any(isinstance(piece, Box) for piece in asked.content):
        content = (*asked.image_indices, "\n".join(part for part in (asked.text.strip(), line) if part))
    messages = (*sample.messages[:place], replace(asked, content=content), *sample.messages[place + 1 :])
    return replace(sample, messages=messages)


def _asked(sample: Sample) -> Sequence[Message]:
    """The messages up to the question."""
    return sample.messages[:-1] if sample.messages[-1].role == "assistant" else sample.messages
