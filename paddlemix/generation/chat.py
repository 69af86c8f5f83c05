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
from paddlemix.errors import UserError
from paddlemix.generation.ending import ending_of
from paddlemix.generation.generate import answer_budget
from paddlemix.generation.sampling import GenerationSettings, Sampler
from paddlemix.models.attention import KVCache
from paddlemix.processors.conversation import prompt_text, render
from paddlemix.processors.image import preprocess_image
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.processors.templates import Template
from paddlemix.sample import IMAGE_TOKEN_INDEX, NEWLINE_INDEX, Message


class ChatSession:
    """One conversation.

    Args:
        loaded: model and processor.
        template: instead of the one stored with the checkpoint.
        settings: length and sampling of answers.

    Raises:
        UserError: the checkpoint has no tokenizer.
    """

    def __init__(
        self, loaded: Pretrained, template: Template | None = None, settings: GenerationSettings | None = None
    ) -> None:
        if loaded.processor is None:
            raise UserError(f"{loaded.directory} has no tokenizer files, so it cannot chat")
        self.model = loaded.model
        self.processor: LlavaProcessor = replace(loaded.processor, template=template or loaded.processor.template)
        self.settings = settings or GenerationSettings()
        self._ending = ending_of(self.processor)
        self.messages: list[Message] = []
        self._sizes: list[tuple[int, int]] = []
        self._features: list[paddle.Tensor] = []  # one per image: [tiles * P, D]
        self._ids = np.zeros(0, dtype=np.int64)  # what the cache holds
        self._cache = KVCache()

    def prompt(self) -> str:
        """The conversation so far as the template writes it, for people to read."""
        open_turn = bool(self.messages) and self.messages[-1].role == "user"
        return prompt_text(render(self.processor.template, self.messages, add_generation_prompt=open_turn))

    def ask(self, question: str, images: Sequence[Image.Image] = ()) -> Iterator[str]:
        """Asks a question and gives the answer piece by piece, as it is made; it then belongs to the history.

        Args:
            question: the user's words; nothing in them is parsed.
            images: RGB, new in this round; they stand before the words.

        Raises:
            UserError: the model has no tower for an image, or the conversation has become too long; the history is then
                as it was before.
        """
        if images and self.model.config.vision is None:
            raise UserError("the question has an image, but the model has no vision tower")
        before = len(self.messages), len(self._sizes)
        self.messages.append(Message(role="user", content=self._content(question, images)))
        try:
            for image in images:
                self._add_image(image)
            hidden = self._prefill()
        except BaseException:
            del self.messages[before[0] :], self._sizes[before[1] :], self._features[before[1] :]
            raise
        yield from self._answer(hidden)

    def _content(self, question: str, images: Sequence[Image.Image]) -> tuple[str | int, ...]:
        numbers = range(len(self._sizes), len(self._sizes) + len(images))
        if len(images) == 1:
            return (*numbers, question)  # the template puts a line break behind a single image
        return (*(part for number in numbers for part in (number, "\n")), question)

    def _add_image(self, image: Image.Image) -> None:
        with paddle.no_grad():
            pixels = paddle.to_tensor(preprocess_image(image, self.processor.image_spec))
            self._features.append(self.model.encode_images(pixels))
        self._sizes.append(image.size)

    @paddle.no_grad()
    def _prefill(self) -> paddle.Tensor:
        """Brings the cache up to the open question; gives the hidden state [1, D] of its last token."""
        example = self.processor.encode_text(self.messages, self._sizes, add_generation_prompt=True)
        ids = example.input_ids
        answer_budget(self.model, len(ids), self.settings.max_new_tokens)
        same = min(_common_prefix(ids, self._ids), len(ids) - 1)
        self._cache.truncate(same)
        self._ids = ids[:same]
        return self._feed(ids[same:], example.image_index[(ids[:same] == IMAGE_TOKEN_INDEX).sum() :])

    def _feed(self, ids: np.ndarray, image_index: np.ndarray) -> paddle.Tensor:
        """Runs tokens [n] behind those in the cache; `image_index` names the feature row of each visual one."""
        count, seen = len(ids), len(self._ids)
        is_image = ids == IMAGE_TOKEN_INDEX
        features = merge_index = None
        if is_image.any():
            features = paddle.concat(self._features)
            index = np.arange(count, dtype=np.int64)
            newline = count + features.shape[0]
            index[is_image] = np.where(image_index == NEWLINE_INDEX, newline, count + image_index)
            merge_index = paddle.to_tensor(index)
        tokens = paddle.to_tensor(np.where(is_image, 0, ids)[None])
        embeds = self.model.merge(tokens, features, merge_index)
        positions = paddle.arange(seen, seen + count).unsqueeze(0)
        hidden = self.model.language_model(embeds, positions, cache=self._cache)
        self._ids = np.concatenate([self._ids, ids])
        return hidden[:, -1]

    def _answer(self, hidden: paddle.Tensor) -> Iterator[str]:
        sampler = Sampler(self.settings)
        budget = answer_budget(self.model, len(self._ids), self.settings.max_new_tokens)
        tokens: list[int] = []
        text, shown = "", 0
        try:
            while len(tokens) < budget:
                token = self._next_token(hidden, sampler)
                if token in self._ending.ids:
                    break
                tokens.append(token)
                text, ended = self._ending.cut(self.processor.tokenizer.decode(tokens).lstrip())
                certain = len(text) if ended else self._ending.certain_length(text)
                if certain > shown:
                    yield text[shown:certain]
                    shown = certain
                if ended:
                    return
                with paddle.no_grad():
                    hidden = self._feed(np.array([token], dtype=np.int64), np.zeros(0, dtype=np.int64))
            if len(text) > shown:
                yield text[shown:]
        finally:
            self.messages.append(Message(role="assistant", content=(text.strip(),)))

    def _next_token(self, hidden: paddle.Tensor, sampler: Sampler) -> int:
        with paddle.no_grad():
            return int(sampler.next_tokens(self.model.logits(hidden).astype("float32").numpy())[0])


def _common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """Number of leading ids that two sequences share."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length
