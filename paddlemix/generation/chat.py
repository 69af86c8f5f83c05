"""A conversation about images over several rounds, with its tokens and key/value cache kept.

    session = ChatSession(load_pretrained("llava-v1.5-7b"))
    for piece in session.ask("What is this?", images=[Image.open("a.png")]):
        print(piece, end="", flush=True)

The history is written by the template from the answers' texts, exactly as training wrote it; what of it equals the
tokens already in the cache is not computed again, and an image is encoded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import paddle
from PIL import Image

from paddlemix.checkpoints.pretrained import Pretrained
from paddlemix.errors import UserError, did_you_mean
from paddlemix.generation.beams import search_beams
from paddlemix.generation.ending import GrowingText, ending_of
from paddlemix.generation.generate import answer_budget
from paddlemix.generation.history import Dropped, Picture, Round, messages_of, question_of
from paddlemix.generation.incremental import IncrementalModel, NewTokens
from paddlemix.generation.sampling import GenerationSettings, Sampler
from paddlemix.log import logger
from paddlemix.processors.images.visual_tokens import count_visual_tokens
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.processors.text.conversation import prompt_text, render
from paddlemix.processors.text.template import Template
from paddlemix.sample import IMAGE_TOKEN_INDEX, NEWLINE_INDEX, Example, Message

ON_OVERFLOW = ("stop", "drop_oldest")
_FIRST_PICTURE = -1000  # ids of the cache below it mean pictures


class ChatSession:
    """One conversation.

    Args:
        loaded: model and processor.
        template: instead of the one stored with the checkpoint.
        settings: length and sampling of answers.
        system: text before the first question, instead of the template's own.
        on_overflow: what a conversation that outgrows the model's context does: "stop" refuses the question and says by
            how much; "drop_oldest" leaves out whole rounds from the beginning, with the images they showed, and says
            so.

    Raises:
        UserError: the checkpoint has no tokenizer, the template no place for a system text, or `on_overflow` is
            another word.
    """

    def __init__(
        self,
        loaded: Pretrained,
        template: Template | None = None,
        settings: GenerationSettings | None = None,
        *,
        system: str | None = None,
        on_overflow: str = "stop",
    ) -> None:
        if loaded.processor is None:
            raise UserError(f"{loaded.directory} has no tokenizer files, so it cannot chat")
        if on_overflow not in ON_OVERFLOW:
            hint = did_you_mean(on_overflow, ON_OVERFLOW)
            raise UserError(f"on_overflow='{on_overflow}' is not one of {', '.join(ON_OVERFLOW)}{hint}")
        self.model = loaded.model
        self.processor: LlavaProcessor = replace(loaded.processor, template=template or loaded.processor.template)
        self.settings = settings or GenerationSettings()
        self.system, self.on_overflow = system, on_overflow
        self.dropped: Dropped | None = None  # by the last question
        self.rounds: list[Round] = []
        self._ending = ending_of(self.processor, self.settings.stop)
        self._marks = np.zeros(0, dtype=np.int64)  # what the cache holds: ids, and a number for each picture's tokens
        self._incremental = IncrementalModel(self.model)
        if system is not None:
            # with any question: a template without a place for a system text fails here, not at the first answer
            render(self.processor.template, messages_of(system, [Round(("?",))]), add_generation_prompt=True)

    @property
    def is_over(self) -> bool:
        """Whether an error has left other processes in the middle of a computation: nothing more can be asked."""
        return self._incremental.is_over

    @property
    def messages(self) -> list[Message]:
        """The conversation so far; its images are numbered in reading order."""
        return messages_of(self.system, self.rounds)

    def prompt(self) -> str:
        """The conversation so far as the template writes it, for people to read; "" before the first question."""
        if not self.rounds:
            return ""
        pieces = render(self.processor.template, self.messages, add_generation_prompt=self.rounds[-1].answer is None)
        return prompt_text(pieces)

    def ask(self, question: str, images: Sequence[Image.Image | Picture] = ()) -> Iterator[str]:
        """Asks a question and yields the answer piece by piece, as it is made; it then belongs to the history.

        Args:
            question: the user's words; `<image>` marks the place of an image, and nothing else in them is parsed.
            images: RGB, new in this round, or pictures of an earlier one; they precede the words unless these say
                otherwise.

        Raises:
            UserError: the model has no tower for an image, `<image>` occurs more or less often than there are
                images, beams are asked for, or the conversation has become too long.  The history is then as before.
        """
        yield from self._stream(self.rounds, self._pictures(images), question)

    def answer(self, question: str, images: Sequence[Image.Image | Picture] = ()) -> str:
        """Asks a question and returns the whole answer; arguments and errors as `ask`, but beams are allowed."""
        if self.settings.num_beams == 1:
            list(self.ask(question, images))
            return self.rounds[-1].answer or ""
        example, scores = self._open(self.rounds, self._pictures(images), question)
        before = self.rounds[:-1]
        try:
            text = self._best_beam(scores, example.input_ids)
        except BaseException:
            # the cache has several rows by now: it is dropped rather than repaired
            self.rounds, self._incremental, self._marks = before, IncrementalModel(self.model), self._marks[:0]
            raise
        self.rounds = [*before, replace(self.rounds[-1], answer=text)]
        return text

    def edit(self, number: int, question: str) -> Iterator[str]:
        """Asks a round's question in other words, about the same images; later rounds are forgotten.

        Args:
            number: of the round, 1 for the first.
            question: see `ask`.

        Returns:
            The new answer, piece by piece.

        Raises:
            UserError: the round does not exist; and as `ask`.
        """
        if not 1 <= number <= len(self.rounds):
            raise UserError(f"there is no round {number} to edit; the conversation has {len(self.rounds)}")
        yield from self._stream(self.rounds[: number - 1], self.rounds[number - 1].pictures, question)

    def back(self, count: int = 1) -> None:
        """Forgets the last rounds and the images they showed.

        Raises:
            UserError: `count` is below 1, or there are fewer rounds.
        """
        if not 1 <= count <= len(self.rounds):
            raise UserError(f"cannot go back {count} rounds; the conversation has {len(self.rounds)}")
        self.rounds = self.rounds[:-count]

    def reset(self) -> None:
        """Forgets all rounds."""
        self.rounds = []

    def _pictures(self, images: Sequence[Image.Image | Picture]) -> list[Picture]:
        if images and self.model.config.vision is None:
            raise UserError("the question has an image, but the model has no vision tower")
        return [image if isinstance(image, Picture) else Picture(image, image.size) for image in images]

    def _stream(self, rounds: list[Round], pictures: list[Picture], question: str) -> Iterator[str]:
        """The answer to a question after some rounds, which replace the conversation's."""
        if self.settings.num_beams > 1:
            raise UserError(
                f"num_beams {self.settings.num_beams}: beam search cannot stream an answer, the best beam is known "
                "at the end alone; ask without streaming (ChatSession.answer, --no-stream)"
            )
        example, scores = self._open(rounds, pictures, question)
        yield from self._answer(scores, example.input_ids)

    def _open(self, rounds: list[Round], pictures: list[Picture], question: str) -> tuple[Example, np.ndarray]:
        """Reads an open question; returns it encoded, and the scores [1, V] of the answer's first token."""
        before, self.dropped = self.rounds, None
        try:
            self.rounds = [*rounds, Round(question_of(question, pictures))]
            example = self._fitted()
            return example, self._prefill(example)
        except BaseException:
            self.rounds = before
            raise

    def _fitted(self) -> Example:
        """The open conversation encoded without tiles, with whole rounds left out from the beginning where asked."""
        limit, rounds = self.model.config.text.max_position_embeddings, self.rounds
        # room for the answer, but never so much that a setting of thousands of tokens drops the whole history
        wanted = min(self.settings.max_new_tokens, limit // 4)
        example = self._encoded()
        while self.on_overflow == "drop_oldest" and len(example.input_ids) + wanted > limit and len(self.rounds) > 1:
            self.rounds = self.rounds[1:]
            example = self._encoded()
        answer_budget(self.model, len(example.input_ids), self.settings.max_new_tokens)
        gone = rounds[: len(rounds) - len(self.rounds)]
        self.dropped = Dropped(len(gone), sum(len(item.pictures) for item in gone)) if gone else None
        if self.dropped:
            logger.warning("%s", self.dropped)
        return example

    def _encoded(self) -> Example:
        sizes = [picture.size for item in self.rounds for picture in item.pictures]
        return self.processor.encode_text(self.messages, sizes, add_generation_prompt=True)

    @paddle.no_grad()
    def _encode_pictures(self) -> list[Picture]:
        """All pictures of the conversation, those that are new encoded."""
        pictures = [picture for item in self.rounds for picture in item.pictures]
        for picture in pictures:
            if picture.features is None and picture.image is not None:
                pixels = paddle.to_tensor(self.processor.tiles([picture.image]))
                picture.features, picture.image = self.model.encode_images(pixels), None
        return pictures

    def _prefill(self, example: Example) -> np.ndarray:
        """Brings the cache up to the open question; returns the scores [1, V] of the answer's first token."""
        pictures, ids = self._encode_pictures(), example.input_ids
        spec, is_image, marks = self.processor.image_spec, ids == IMAGE_TOKEN_INDEX, ids.copy()
        counts = [count_visual_tokens(picture.size[0], picture.size[1], spec) for picture in pictures]
        # Visual tokens share one id: each picture's number in their place tells equal prompts about two pictures apart.
        marks[is_image] = np.repeat([_FIRST_PICTURE - picture.number for picture in pictures], counts)
        # at least one token is read anew, because its scores are what is asked for
        same = min(_common_prefix(marks, self._marks), len(ids) - 1, self._incremental.cache.length)
        self._incremental.truncate(same)
        # before the model runs: if that fails, the cache is described correctly
        self._marks = marks[:same]
        tokens = self._new_tokens(ids[same:], example.image_index[is_image[:same].sum() :], pictures)
        scores = self._incremental.extend(tokens, self.settings.is_greedy)
        self._marks = marks
        return scores

    @paddle.no_grad()
    def _new_tokens(self, ids: np.ndarray, image_index: np.ndarray, pictures: Sequence[Picture]) -> NewTokens:
        """Ids [n] with the pictures' features in their places; `image_index` names the feature row of each visual
        one."""
        is_image = ids == IMAGE_TOKEN_INDEX
        if not is_image.any():
            return NewTokens(ids)
        features = paddle.concat([picture.features for picture in pictures])
        index = np.arange(len(ids), dtype=np.int64)
        newline = len(ids) + features.shape[0]
        # rows of [embeddings, features of all pictures, newline], as `collate` counts them
        index[is_image] = np.where(image_index == NEWLINE_INDEX, newline, len(ids) + image_index)
        return NewTokens(np.where(is_image, 0, ids), features, index)

    def _best_beam(self, scores: np.ndarray, prompt_ids: np.ndarray) -> str:
        budget = answer_budget(self.model, len(prompt_ids), self.settings.max_new_tokens)
        reached = self._ending.reached(self.processor.tokenizer)

        def is_last(tokens: list[int]) -> bool:
            return len(tokens) >= budget or (reached is not None and reached(tokens))

        tokens = search_beams(self._incremental, scores, prompt_ids, self.settings, self._ending.ids, is_last)
        self._incremental.select(np.zeros(1, dtype=np.int64))  # the cache of the prompt, which all beams share
        return self._ending.cut(self.processor.tokenizer.decode(tokens).lstrip())[0].strip()

    def _answer(self, scores: np.ndarray, prompt_ids: np.ndarray) -> Iterator[str]:
        """The answer piece by piece; the open round has as much of it as was heard, whatever ends this."""
        asked, sampler = self.rounds[-1], Sampler(self.settings, prompt_ids, len(self.rounds))
        budget = answer_budget(self.model, len(prompt_ids), self.settings.max_new_tokens)
        growing = GrowingText(self.processor.tokenizer, self._ending)
        try:
            for left in reversed(range(budget)):
                token = sampler.next_token(scores[0])
                if token in self._ending.ids:
                    break
                if piece := growing.add(token):
                    yield piece
                if growing.ended or not left:
                    break
                scores = self._incremental.step(np.array([token], dtype=np.int64))
                self._marks = np.append(self._marks, token)
            if piece := growing.rest():
                yield piece
        finally:
            # whoever stops listening keeps what was heard; `reset` or `back` in the meantime wins
            if self.rounds and self.rounds[-1] is asked:
                self.rounds = [*self.rounds[:-1], replace(asked, answer=growing.text.strip())]


def _common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """Number of leading ids that two sequences share."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length
