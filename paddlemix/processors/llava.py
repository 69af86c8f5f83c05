"""Sample -> Example: renders the conversation, tokenises it piece by piece and places every visual token.

Ids and labels come out of one pass; the length is exact before the model runs.  Knows no file format and no model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from paddlemix.errors import UserError, did_you_mean
from paddlemix.log import logger
from paddlemix.processors.images.boxes import write_boxes
from paddlemix.processors.images.image_config import image_spec_from_dict, image_spec_to_dict
from paddlemix.processors.images.image_spec import ImageSpec
from paddlemix.processors.images.tiles import preprocess_image
from paddlemix.processors.images.visual_tokens import count_tiles, count_visual_tokens, visual_token_index
from paddlemix.processors.text.chat_template import read_template, template_value
from paddlemix.processors.text.conversation import render, render_rounds
from paddlemix.processors.text.encoding import EncodedPair, encode_pairs, expand_pairs
from paddlemix.processors.text.template import IMAGE_END, IMAGE_START, Template, with_image_markers
from paddlemix.processors.text.tokenizer import Tokenizer, load_tokenizer
from paddlemix.sample import NEWLINE_INDEX, Box, Example, Message, Sample

PROCESSOR_FILE = "processor_config.json"
ON_TOO_LONG = ("truncate_turns", "skip", "error")
_SHOWN_TRUNCATIONS = 3  # of a million, more tell nothing new
_truncations = itertools.count(1)


class TooLongError(UserError):
    """A sample that does not fit `max_length` and is not to be, or cannot be, shortened."""


@dataclass(frozen=True, kw_only=True)
class LlavaProcessor:
    """Everything a checkpoint declares about text and images.

    Args:
        tokenizer: of the language model.
        template: how conversations are written; stored with the checkpoint.
        image_spec: how images become tiles and tokens.
        end_ids: tokens that end an answer, besides what the tokenizer and the template say.
        image_markers: the model's `mm_use_im_start_end`: `<im_start>` and `<im_end>` surround every image, whatever
            the template.
    """

    tokenizer: Tokenizer
    template: Template
    image_spec: ImageSpec
    image_markers: bool = False
    end_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.image_markers:
            return
        # written as text, they would become several pieces that the model has never seen there
        missing = [token for token in (IMAGE_START, IMAGE_END) if self.tokenizer.special_id(token) is None]
        if missing:
            raise UserError(
                f"mm_use_im_start_end is set, but the tokenizer has no token {' and no '.join(missing)}; "
                "copy added_tokens.json and tokenizer_config.json of the model too"
            )

    @cached_property
    def _written(self) -> Template:
        """The template with the markers that the model wants."""
        return with_image_markers(self.template) if self.image_markers else self.template

    def encode(
        self,
        sample: Sample,
        images: Sequence[Image.Image],
        max_length: int | None = None,
        on_too_long: str = "truncate_turns",
    ) -> Example:
        """Encodes a training sample.

        Args:
            sample: its messages end with an answer.
            images: RGB, one for each of `sample.images`.
            max_length: most tokens, visual ones included; None for no limit.
            on_too_long: "truncate_turns" leaves out the last question-answer pairs, as many as needed, and warns for
                the first few samples; "skip" and "error" raise.

        Returns:
            The example.  An image is never cut.

        Raises:
            TooLongError: the sample is too long and is not to be truncated, or its first question and answer alone are.
            UserError: nothing is supervised, a box lies outside of its image, or the template cannot write this
                conversation.  All begin with the sample's source.
        """
        example, order = self.encode_sized(sample, [image.size for image in images], max_length, on_too_long)
        return replace(example, pixel_values=self.tiles([images[index] for index in order]))

    def encode_sized(
        self,
        sample: Sample,
        sizes: Sequence[tuple[int, int]],
        max_length: int | None = None,
        on_too_long: str = "truncate_turns",
    ) -> tuple[Example, tuple[int, ...]]:
        """Encodes a training sample without its tiles; arguments and errors as `encode` and `measure`.

        Returns:
            The example, and the indices of the images whose tiles it wants, in order.
        """
        pairs = self._fit(sample, sizes, max_length, on_too_long)
        # pairs that `_fit` left out; each is two turns of the conversation
        dropped = sum(message.role == "assistant" for message in sample.messages) - len(pairs)
        if dropped:
            _tell_truncation(sample.source, 2 * dropped, max_length)
        # a truncated conversation shows fewer images: only theirs are cut into tiles
        order = tuple(index for pair in pairs for index in pair.images)
        return replace(self._example(pairs, sizes), source=sample.source), order

    def measure(
        self,
        sample: Sample,
        sizes: Sequence[tuple[int, int]],
        max_length: int | None = None,
        on_too_long: str = "truncate_turns",
    ) -> tuple[int, int]:
        """Length of what `encode` makes of a sample, from image sizes alone.

        Args:
            sizes: (width, height) of each of `sample.images`, pixels, upright.

        Returns:
            Tokens, visual ones included, and how many of them are visual.

        Raises:
            TooLongError, UserError: as `encode`.
        """
        pairs = self._fit(sample, sizes, max_length, on_too_long)
        return sum(pair.length for pair in pairs), sum(pair.num_visual for pair in pairs)

    def check(self, sample: Sample) -> None:
        """Whether the template can write a sample's conversation; needs neither images nor their sizes.

        Raises:
            UserError: it cannot.
        """
        messages = [
            # a box's text depends on its image's size; here any text will do in its place
            replace(message, content=tuple("[]" if isinstance(piece, Box) else piece for piece in message.content))
            for message in sample.messages
        ]
        render(self._written, messages)

    def encode_prompt(self, messages: Sequence[Message], images: Sequence[Image.Image]) -> Example:
        """Encodes a conversation that ends with a question, ready for its answer; labels mark the answers before."""
        sizes = [image.size for image in images]
        pairs = list(self._pairs(messages, sizes, add_generation_prompt=True))
        order = [index for pair in pairs for index in pair.images]
        return replace(self._example(pairs, sizes), pixel_values=self.tiles([images[index] for index in order]))

    def encode_text(
        self, messages: Sequence[Message], sizes: Sequence[tuple[int, int]], add_generation_prompt: bool = False
    ) -> Example:
        """Ids, labels and visual order from image sizes alone: no pixel is read.

        Args:
            sizes: (width, height) of each image that `messages` name, pixels.

        Returns:
            An example without tiles (`pixel_values` [0, 3, H, W]).
        """
        return self._example(list(self._pairs(messages, sizes, add_generation_prompt)), sizes)

    def _pairs(
        self, messages: Sequence[Message], sizes: Sequence[tuple[int, int]], add_generation_prompt: bool = False
    ) -> Iterator[EncodedPair]:
        messages = write_boxes(messages, sizes, self.image_spec)
        rounds = render_rounds(self._written, messages, add_generation_prompt)
        return encode_pairs(rounds, self.tokenizer, lambda image: count_visual_tokens(*sizes[image], self.image_spec))

    def _fit(
        self, sample: Sample, sizes: Sequence[tuple[int, int]], max_length: int | None, on_too_long: str
    ) -> list[EncodedPair]:
        """The pairs that fit; later ones are not even tokenised."""
        try:
            if on_too_long not in ON_TOO_LONG:
                hint = did_you_mean(on_too_long, ON_TOO_LONG)
                raise UserError(f"on_too_long='{on_too_long}' is not one of {', '.join(ON_TOO_LONG)}{hint}")
            kept: list[EncodedPair] = []
            # `pairs` is lazy: of a conversation far over the limit only what fits, and one pair more, is tokenised
            length, pairs = 0, self._pairs(sample.messages, sizes)
            for pair in pairs:
                length += pair.length
                if max_length is not None and length > max_length:
                    # on_too_long    -> for a sample that does not fit
                    # truncate_turns -> the last pairs go; without the first pair nothing is left, which is an error
                    # skip, error    -> the same error; the caller leaves the sample out or stops
                    if not kept or on_too_long != "truncate_turns":
                        raise _too_long([*kept, pair, *pairs], max_length, on_too_long)
                    break
                kept.append(pair)
            if not any(pair.trained for pair in kept):
                raise UserError("nothing to learn, every answer is empty")
        except UserError as error:
            raise type(error)(f"{sample.source}: {error}") from error
        return kept

    def _example(self, pairs: Sequence[EncodedPair], sizes: Sequence[tuple[int, int]]) -> Example:
        ids, labels = expand_pairs(pairs)
        indices = self._visual_indices([sizes[image] for pair in pairs for image in pair.images])
        size = self.image_spec.tile_size
        return Example(
            input_ids=ids,
            labels=labels,
            pixel_values=np.zeros((0, 3, size, size), dtype=np.float32),
            image_index=np.concatenate(indices) if indices else np.zeros(0, dtype=np.int64),
        )

    def _visual_indices(self, sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """For each image in reading order, the feature rows of its tokens; tiles count in that order."""
        indices, first_row = [], 0
        for width, height in sizes:
            index = visual_token_index(width, height, self.image_spec)
            # rows count over all images of a sample, newlines have no row of their own
            indices.append(np.where(index == NEWLINE_INDEX, NEWLINE_INDEX, index + first_row))
            first_row += count_tiles(width, height, self.image_spec) * self.image_spec.tokens_per_tile
        return indices

    def tiles(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Tiles of RGB images, one image after the other: float32 [N, 3, H, W]."""
        size = self.image_spec.tile_size
        tiles = [preprocess_image(image, self.image_spec) for image in images]
        # most samples have one picture, and its tiles are megabytes
        if len(tiles) == 1:
            return tiles[0]  # nothing to copy
        return np.concatenate(tiles) if tiles else np.zeros((0, 3, size, size), dtype=np.float32)

    def to_dict(self) -> dict[str, Any]:
        """The content of `processor_config.json`."""
        return {
            "chat_template": template_value(self.template),
            "mm_use_im_start_end": self.image_markers,
            **image_spec_to_dict(self.image_spec),
            # left out where the tokenizer says it already: files of most models stay as short as they were
            **({"eos_token_id": list(self.end_ids)} if set(self.end_ids) - {self.tokenizer.eos_token_id} else {}),
        }


def _tell_truncation(source: str, turns: int, max_length: int | None) -> None:
    number = next(_truncations)
    if number <= _SHOWN_TRUNCATIONS:
        last = "; further ones are not shown" if number == _SHOWN_TRUNCATIONS else ""
        logger.warning("%s: the last %d turns do not fit max_length %s%s", source, turns, max_length, last)


def _too_long(pairs: Sequence[EncodedPair], max_length: int, on_too_long: str) -> TooLongError:
    # whichever part cannot fit is named: shortening others would not help
    first = on_too_long == "truncate_turns" or len(pairs) == 1 or pairs[0].length > max_length
    counted = pairs[:1] if first else pairs
    length, visual = sum(pair.length for pair in counted), sum(pair.num_visual for pair in counted)
    what = "the first question and answer have" if first else "the conversation has"
    remedy = "remove the record" if first else "set on_too_long to truncate_turns"
    return TooLongError(
        f"{what} {length} tokens ({visual} of them visual), max_length is {max_length}; raise max_length or {remedy}"
    )


def processor_from_dict(values: dict[str, Any], directory: str | Path) -> LlavaProcessor:
    """Builds the processor from a `processor_config.json`'s content and the tokenizer files in `directory`.

    Raises:
        UserError: a key is missing or a value is not allowed.
        MissingFileError: no tokenizer files.
    """
    try:
        spec = image_spec_from_dict(values)
        template = read_template(values["chat_template"])
    except KeyError as error:
        raise UserError(f"{Path(directory) / PROCESSOR_FILE} has no key {error}") from error
    return LlavaProcessor(
        tokenizer=load_tokenizer(directory),
        template=template,
        image_spec=spec,
        image_markers=bool(values.get("mm_use_im_start_end")),
        end_ids=tuple(values.get("eos_token_id") or ()),
    )
