"""The rounds of a conversation and the pictures they show, from which everything else is rendered.

Knows no model but what it makes of a picture; nothing here is tokenised.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import paddle
from PIL import Image

from paddlemix.errors import UserError
from paddlemix.sample import IMAGE_TOKEN, Message

_numbers = itertools.count(1)


@dataclass(eq=False)
class Picture:
    """An image of a conversation.

    Args:
        image: RGB; None once it is encoded.
        size: width and height, pixels.
        features: what tower and projector make of it, [tiles * P, D]; None before.
        number: tells pictures apart, also equal ones.
    """

    image: Image.Image | None
    size: tuple[int, int]
    features: paddle.Tensor | None = None
    number: int = field(default_factory=lambda: next(_numbers))


Part: TypeAlias = "str | Picture"


@dataclass(frozen=True)
class Round:
    """A question and its answer.

    Args:
        question: words and pictures in order.
        answer: None while it is open.
    """

    question: tuple[Part, ...]
    answer: str | None = None

    @property
    def pictures(self) -> list[Picture]:
        """Those of the question, in order."""
        return [part for part in self.question if isinstance(part, Picture)]


@dataclass(frozen=True)
class Dropped:
    """What was left out of a conversation that outgrew the model's context.

    Args:
        rounds: how many of the oldest ones.
        images: pictures that these showed.
    """

    rounds: int
    images: int

    def __str__(self) -> str:
        """One sentence for people."""
        rounds = "the oldest round" if self.rounds == 1 else f"the {self.rounds} oldest rounds"
        shown = {0: "", 1: " and the image it showed"}.get(self.images, f" and the {self.images} images shown there")
        return f"the conversation outgrew the model's context: {rounds}{shown} left out"


def question_of(text: str, pictures: Sequence[Picture]) -> tuple[Part, ...]:
    """A question's words and pictures.

    Args:
        text: `<image>` in it marks the place of a picture; without it all precede the words.
        pictures: those of this question.

    Raises:
        UserError: `<image>` occurs more or less often than there are pictures.
    """
    # <image> in the text -> pictures
    # as many as pictures -> at these places
    # none, one picture   -> before the words, the line break is the template's
    # none, several       -> before the words, a line break after each
    places = text.count(IMAGE_TOKEN)
    if places and places != len(pictures):
        given = "no image was given" if not pictures else f"{len(pictures)} images were given"
        given = "1 image was given" if len(pictures) == 1 else given
        raise UserError(
            f"the question has {IMAGE_TOKEN} {places} times, but {given}; give one for each, or leave {IMAGE_TOKEN} out"
        )
    if not places:
        if len(pictures) == 1:
            return (*pictures, text)  # the template puts a line break after a single image
        return (*(part for picture in pictures for part in (picture, "\n")), text)
    words = text.split(IMAGE_TOKEN)
    # there is always one text more than pictures
    pairs = itertools.zip_longest(words, pictures)
    return tuple(part for pair in pairs for part in pair if part is not None and part != "")


def messages_of(system: str | None, rounds: Sequence[Round]) -> list[Message]:
    """Rounds as messages; pictures are numbered in reading order."""
    messages = [] if system is None else [Message(role="system", content=(system,))]
    # counted over all rounds, as `Sample.images` is
    numbers: Iterator[int] = itertools.count()
    for item in rounds:
        content = tuple(next(numbers) if isinstance(part, Picture) else part for part in item.question)
        messages.append(Message(role="user", content=content))
        if item.answer is not None:
            messages.append(Message(role="assistant", content=(item.answer,)))
    return messages
