"""The places of pictures in a text: our `<image>`, and what other programs write for it.

    split_text("What is <img>a.png</img> doing?")  # ("What is ", PlacedImage("a.png"), " doing?")

What is read is a place; what looks like a picture and is not read is reported by `unread_picture`, because it would be
trained as words.  Knows no record and opens no picture.

Sources: Qwen-VL's and ms-swift's `<img>PATH</img>` (QwenLM/Qwen-VL README, "Finetuning"; ms-swift docs,
Custom-dataset); the image tokens of Llama 3.2 Vision, mPLUG-Owl3, Qwen2-VL, Phi-3-vision, InternLM-XComposer, InternVL
and DeepSeek-VL as their processors name them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from paddlemix.datasets.forms.image_keys import PLACE, PlacedImage, image_address
from paddlemix.errors import cut
from paddlemix.sample import IMAGE_TOKEN, Message

# Whatever a text holds, each of these patterns reads a character a few times at most.
# `<image>`, or the tag of Qwen-VL; what is in it may be no address, see `_address`.
_READ = re.compile(r"<image>|<img>([^<>]*)</img>")
_LONGEST_ADDRESS = 4096  # characters
# Other programs' tokens for the next picture of a record's list.
_TOKENS = re.compile(
    r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>|<\|image_pad\|>|<\|image(?:_\d+)?\|>|<image_\d+>"
    r"|<ImageHere>|<image_placeholder>|<img>(?:<IMG_CONTEXT>)+</img>|<IMG_CONTEXT>|<Image>|<IMAGE>|\[IMG\]"
)
# Pictures of markup languages: `![words](a.png)` and `<img src="a.png">`.
_MARKUP = re.compile(
    r"!\[[^\[\]\n]*\]\([^()\s]+\.(?:jpe?g|png|webp|gif|bmp|tiff?)(?:\s[^()\n]*)?\)"
    r"|<img\s(?=[^<>]*\bsrc\s*=)[^<>]*>",
    re.IGNORECASE,
)
_SHOWN = 80  # characters


def split_text(text: str) -> tuple[str | PlacedImage, ...]:
    """A user's text with a place for each `<image>`, and for each `<img>PATH</img>` with its path."""
    pieces: list[str | PlacedImage] = []
    end = 0
    for found in _READ.finditer(text):
        shown = PLACE if found[1] is None else _address(found[1].strip())
        if shown is not None:
            pieces += [text[end : found.start()], shown]
            end = found.end()
    return tuple(piece for piece in (*pieces, text[end:]) if piece) if pieces else (text,)


def _address(text: str) -> PlacedImage | None:
    """The picture that a tag names; None for words that are not an address."""
    if not text or "\n" in text or len(text) > _LONGEST_ADDRESS:
        return None
    return PlacedImage(image_address(text, "<img>"))


def place_tokens(
    contents: Sequence[tuple[str | PlacedImage, ...]], count: int
) -> list[tuple[str | PlacedImage, ...]] | None:
    """Users' texts with places where another program's image tokens are.

    Args:
        contents: of the user's turns, in order, without a place.
        count: pictures that the record lists.

    Returns:
        The contents with `count` places; None where there are not as many tokens.
    """
    if (
        not count
        or sum(len(_TOKENS.findall(piece)) for pieces in contents for piece in pieces if isinstance(piece, str))
        != count
    ):
        return None
    return [tuple(part for piece in pieces for part in _split_at_tokens(piece)) for pieces in contents]


def _split_at_tokens(piece: str | PlacedImage) -> list[str | PlacedImage]:
    if not isinstance(piece, str):
        return [piece]
    parts: list[str | PlacedImage] = []
    for number, part in enumerate(_TOKENS.split(piece)):
        parts += [PLACE] * (number > 0) + [part] * bool(part)
    return parts


def unread_picture(messages: Sequence[Message]) -> str | None:
    """What in a user's words looks like a picture and is not read as one, as a message; None where nothing does.

    Args:
        messages: of a sample, with its pictures in their places.
    """
    for message in messages:
        for piece in message.content:
            if message.role == "user" and isinstance(piece, str):
                found = _TOKENS.search(piece) or _MARKUP.search(piece) or _READ.search(piece)
                if found is not None:
                    return (
                        f"'{cut(found[0], _SHOWN)}' in a question is read as words, no picture is shown there; where "
                        f"one is meant, write {IMAGE_TOKEN} and name the picture in 'image' or 'images'"
                    )
    return None
