"""Messages -> pieces: the rendering of a conversation by its template.

`render` returns text pieces, special tokens and images, each marked as trained or not; it never tokenises, and nothing
parses what it made.  What is trained is by construction every answer and what ends it.

Source of the rules on images: haotian-liu/LLaVA llava/train/train.py, preprocess_multimodal (commit c121f04).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from paddlemix.errors import UserError
from paddlemix.processors.text.template import CONTENT, IMAGE, SPECIAL_TOKENS, SYSTEM, Template
from paddlemix.sample import IMAGE_TOKEN, Box, Message

PieceKind = Literal["text", "special", "image"]
_SPECIAL = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")")


@dataclass(frozen=True)
class Piece:
    """A stretch of the rendered conversation.

    Args:
        kind: "text", a "special" token (an id of its own where the vocabulary has it), or an "image".
        text: the text or the special token; "<image>" for an image.
        supervised: whether its tokens are trained.
        image: index into `Sample.images` for an image, else None.
    """

    kind: PieceKind
    text: str
    supervised: bool = False
    image: int | None = None


def render(template: Template, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[Piece]:
    """Writes a conversation down as pieces.

    Args:
        template: the way to write it.
        messages: an optional system turn, then user and assistant in turn, beginning with the user.
        add_generation_prompt: end with the opening of an assistant's turn; the last message is then the user's.

    Returns:
        Pieces in order, neighbouring texts of equal kind joined within a pair.  BOS is not among them.

    Raises:
        UserError: the roles do not alternate, an image is outside a user's turn, a box is not written yet, or the
            template cannot write such a conversation.
    """
    return [piece for pieces in render_rounds(template, messages, add_generation_prompt) for piece in pieces]


def render_rounds(
    template: Template, messages: Sequence[Message], add_generation_prompt: bool = False
) -> list[list[Piece]]:
    """As `render`, one list for each question-answer pair; the system text belongs to the first.

    The pieces of the first pairs are those of a conversation that has only these.
    """
    for message in messages:
        _check_content(message)
    # text for {system}   -> comes from
    # a system turn       -> that turn, even where it is empty
    # no system turn      -> the template's own text
    has_system = bool(messages) and messages[0].role == "system"
    system = messages[0].text if has_system else template.system
    turns = messages[1:] if has_system else messages
    if system and not template.first_user and not template.captions:
        raise UserError(f"template '{template.name}' has no place for a system text; remove the turn of the system")
    _check_order(turns, add_generation_prompt)
    if template.captions:
        _check_caption(template, turns)
    return [
        _join(_write_pair(template, system if number == 0 else "", turns[number : number + 2], number == 0))
        for number in range(0, len(turns), 2)
    ]


def prompt_text(pieces: Sequence[Piece]) -> str:
    """The rendered text for people to read, `<image>` for an image."""
    return "".join(piece.text for piece in pieces)


def _check_content(message: Message) -> None:
    for piece in message.content:
        if isinstance(piece, Box):
            raise UserError(
                f"the box {list(piece.corners)} is not text yet; processors.images.boxes.write_boxes makes it text"
            )
        if isinstance(piece, int) and message.role != "user":
            raise UserError(f"a turn of the {message.role} has an image; only a user's turn can show one")


def _check_order(turns: Sequence[Message], add_generation_prompt: bool) -> None:
    for number, message in enumerate(turns):
        # answers are trained by their place, so a turn out of order would train a question
        expected = ("user", "assistant")[number % 2]
        if message.role != expected:
            raise UserError(
                f"turn {number + 1} is by the {message.role}, expected the {expected}: turns alternate user, assistant"
            )
    last = "user" if add_generation_prompt else "assistant"
    if not turns or turns[-1].role != last:
        found = f"ends with a turn of the {turns[-1].role}" if turns else "is empty"
        raise UserError(f"the conversation {found}; its last turn must be by the {last}")


def _check_caption(template: Template, turns: Sequence[Message]) -> None:
    images = turns[0].image_indices
    if len(turns) > 2 or len(images) != 1:
        raise UserError(
            f"template '{template.name}' needs one image and one caption, got {len(images)} images and "
            f"{(len(turns) + 1) // 2} question-answer pairs; use vicuna_v1 for conversations"
        )


def _write_pair(template: Template, system: str, turns: Sequence[Message], first: bool) -> Iterator[Piece]:
    # what LLaMA-2 writes between rounds belongs to the second of them, so that the first pair is complete without it
    if not first:
        yield from _fixed(template.between)
    yield from _question(template, system, turns[0])
    yield from _fixed(template.assistant)
    if len(turns) == 2:
        # the answer and its end are the only trained pieces
        before, after = template.answer.split(CONTENT)
        yield Piece("text", before + turns[1].text + after, supervised=True)
        yield from _fixed(template.end, supervised=True)
        yield from _fixed(template.after_answer)


def _question(template: Template, system: str, message: Message) -> Iterator[Piece]:
    """A user's turn; the system text goes before the first."""
    if template.captions:
        yield Piece("image", IMAGE_TOKEN, image=message.image_indices[0])
        return
    # without a system text the first question is written like any other
    before, after = (template.first_user if system else template.user).split(CONTENT)
    opening, found, rest = before.partition(SYSTEM)
    yield from _fixed(opening)
    # the template's own text may hold special tokens; a user's is text whatever it holds
    if found and system == template.system:
        yield from _fixed(system)
    elif found:
        yield Piece("text", system)
    yield from _fixed(rest)
    yield from _content(template, message)
    yield from _fixed(after)


def _content(template: Template, message: Message) -> Iterator[Piece]:
    """Pieces of a user's words and images.  A single image moves to the front, followed by a line break, and the words
    lose outer white space, as in the reference; several images stay where they are."""
    images = message.image_indices
    # one image      -> to the front, a line break, then the stripped words (LLaVA's preprocess_multimodal)
    # none, several  -> as written
    if len(images) != 1:
        for part in message.content:
            if isinstance(part, int):
                yield from _image(template, part)
            elif isinstance(part, str):
                yield Piece("text", part)
        return
    yield from _image(template, images[0])
    text = message.text.strip()
    if text:
        yield Piece("text", "\n" + text)


def _image(template: Template, index: int) -> Iterator[Piece]:
    # markers around an image are special tokens of their own, never part of the words beside it
    before, after = template.image.split(IMAGE)
    yield from _fixed(before)
    yield Piece("image", IMAGE_TOKEN, image=index)
    yield from _fixed(after)


@lru_cache(maxsize=512)
def _fixed(text: str, supervised: bool = False) -> tuple[Piece, ...]:
    """Pieces of a template's own text, its special tokens apart."""
    parts = enumerate(_SPECIAL.split(text))
    return tuple(Piece("special" if number % 2 else "text", part, supervised) for number, part in parts if part)


def _join(pieces: Iterator[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for piece in pieces:
        if piece.kind == "text" and not piece.text:
            continue
        previous = joined[-1] if joined else None
        # joined, because a tokenizer may merge across the seam of two texts; never across trained and untrained
        same = previous and previous.kind == piece.kind == "text" and previous.supervised == piece.supervised
        if previous and same:
            joined[-1] = Piece("text", previous.text + piece.text, piece.supervised)
        else:
            joined.append(piece)
    return joined
