"""An encoded example as text for people to read: what is trained is marked, an image is named with its tokens.

Ids and labels are the example's own; nothing is encoded a second way.  Knows no file and no command.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paddlemix.processors.text.tokenizer import Tokenizer
from paddlemix.sample import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX, Example

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a terminal would obey them


@dataclass(frozen=True)
class Style:
    """How stretches of text are marked.

    Args:
        trained, image: what is put before and after such a stretch.
    """

    trained: tuple[str, str]
    image: tuple[str, str]

    @classmethod
    def coloured(cls) -> Style:
        """For a terminal: trained text green, images blue."""
        return cls(("\x1b[32m", "\x1b[0m"), ("\x1b[34m", "\x1b[0m"))

    @classmethod
    def plain(cls) -> Style:
        """For files and pipes: trained text in double brackets."""
        return cls(("[[", "]]"), ("", ""))

    @classmethod
    def of_stream(cls, stream: Any) -> Style:
        """Coloured where a stream is a terminal, unless the environment's NO_COLOR is set.

        Source: https://no-color.org
        """
        is_terminal = stream is not None and stream.isatty()
        return cls.coloured() if is_terminal and not os.environ.get("NO_COLOR") else cls.plain()

    @property
    def legend(self) -> str:
        """One line on the marks."""
        return f"{'trained'.join(self.trained)} tokens are marked so; {'<image x N>'.join(self.image)} is an image"


def one_token_an_image(example: Example, image_tokens: Sequence[int]) -> tuple[list[int], list[int]]:
    """Ids and labels with one -200 and -100 for each image, as the reference has them.

    Args:
        image_tokens: visual tokens of each image, in reading order.
    """
    kept, position, counts = [], 0, iter(image_tokens)
    ids = example.input_ids
    while position < len(ids):
        # the first token of an image, for all of them
        kept.append(position)
        position += next(counts) if ids[position] == IMAGE_TOKEN_INDEX else 1
    return ids[kept].tolist(), example.labels[kept].tolist()


def image_runs(example: Example) -> list[int]:
    """Lengths of the stretches of visual tokens; images that touch count as one."""
    # +1 where a stretch begins, -1 after its end
    edges = np.flatnonzero(np.diff(np.pad(example.input_ids == IMAGE_TOKEN_INDEX, 1).astype(np.int8)))
    return (edges[1::2] - edges[::2]).tolist()


def marked_text(example: Example, image_tokens: Sequence[int], tokenizer: Tokenizer, style: Style) -> str:
    """The text of an example; a mark ends and begins again at a line break, so that each line can be read alone.

    Args:
        image_tokens: visual tokens of each image, in reading order; `image_runs` where they are not known.
    """
    return "".join(_marked(example, image_tokens, tokenizer, style))


def _marked(example: Example, image_tokens: Sequence[int], tokenizer: Tokenizer, style: Style) -> Iterator[str]:
    ids, labels = one_token_an_image(example, image_tokens)
    counts, before = iter(image_tokens), None
    for (is_image, trained), group in itertools.groupby(
        zip(ids, labels, strict=True), key=lambda pair: (pair[0] == IMAGE_TOKEN_INDEX, pair[1] != IGNORE_INDEX)
    ):
        members = [index for index, _ in group]
        if is_image:
            for _ in members:
                yield f"{style.image[0]}{IMAGE_TOKEN[:-1]} x {next(counts)}>{style.image[1]}"
            # the text after an image is tokenised as a beginning, so it is decoded as one
            before = None
            continue
        text = escape_control(_decode(members, before, tokenizer))
        start, end = style.trained if trained else ("", "")
        # a colour that runs over a line break would colour what a pager shows beside it
        yield "\n".join(f"{start}{line}{end}" if line else line for line in text.split("\n"))
        before = members[-1]


def _decode(ids: list[int], before: int | None, tokenizer: Tokenizer) -> str:
    """Text of ids after another id: SentencePiece drops the space before the first of all."""
    if before is None:
        return tokenizer.decode(ids, skip_special_tokens=False)
    # decoded together with the id before and cut, because SentencePiece drops a leading space
    own, both = (tokenizer.decode(part, skip_special_tokens=False) for part in ([before], [before, *ids]))
    return both[len(own) :] if both.startswith(own) else tokenizer.decode(ids, skip_special_tokens=False)


def escape_control(text: str) -> str:
    """A text whose control characters, line breaks and tabs apart, are written out."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
