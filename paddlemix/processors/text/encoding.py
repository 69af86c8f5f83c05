"""Pieces -> token ids, labels and lengths, one question-answer pair after the other.

Each pair is tokenised on its own, so lengths add up and a conversation that is cut keeps the ids of what stays.  Knows
no template and no pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from paddlemix.processors.text.conversation import Piece
from paddlemix.processors.text.tokenizer import Neighbour, Tokenizer
from paddlemix.sample import IGNORE_INDEX, IMAGE_TOKEN_INDEX

_Ids = tuple[int, ...]
_IMAGE: tuple[_Ids, Neighbour] = (IMAGE_TOKEN_INDEX,), "start"


@dataclass(slots=True)
class EncodedPair:
    """A question and its answer; the first pair has BOS and the system text too, the last may lack its answer.

    Args:
        ids: token ids, `IMAGE_TOKEN_INDEX` once for each image.
        labels: as long as `ids`.
        images: index into `Sample.images` of each image, in order.
        visual: visual tokens of each image.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    visual: list[int] = field(default_factory=list)

    @property
    def num_visual(self) -> int:
        """Visual tokens."""
        return sum(self.visual)

    @property
    def length(self) -> int:
        """Tokens, visual ones included."""
        return len(self.ids) - len(self.images) + self.num_visual

    @property
    def trained(self) -> bool:
        """Whether anything is supervised."""
        return any(label != IGNORE_INDEX for label in reversed(self.labels))


def encode_pairs(
    rounds: Iterable[Sequence[Piece]], tokenizer: Tokenizer, count_visual: Callable[[int], int]
) -> Iterator[EncodedPair]:
    """Tokenises the pieces of each question-answer pair, when it is asked for.

    Args:
        rounds: as `conversation.render_rounds` returns them.
        count_visual: visual tokens of the image with this index into `Sample.images`.
    """
    # carried from piece to piece and pair to pair: whether a piece gets a leading space depends on what precedes it
    after: Neighbour = "start"
    pair = EncodedPair()
    # once for the whole conversation, in its first pair
    if tokenizer.bos_token_id is not None:
        pair.ids.append(tokenizer.bos_token_id)
        pair.labels.append(IGNORE_INDEX)
    for pieces in rounds:
        for piece in _known(pieces, tokenizer):
            if piece.image is not None:
                pair.images.append(piece.image)
                pair.visual.append(count_visual(piece.image))
                encoded: tuple[_Ids, Neighbour] = _IMAGE  # the text after an image is tokenised on its own
            else:
                encoded = _encode_piece(tokenizer, piece.kind == "special", piece.text, after)
            ids, after = encoded
            pair.ids += ids
            pair.labels += ids if piece.supervised else (IGNORE_INDEX,) * len(ids)
        yield pair
        pair = EncodedPair()


def _known(pieces: Sequence[Piece], tokenizer: Tokenizer) -> Iterator[Piece]:
    """The pieces, where a special token that the vocabulary does not know is text, one with the text around it."""
    waiting: Piece | None = None
    for piece in pieces:
        if piece.kind == "image" or (piece.kind == "special" and tokenizer.special_id(piece.text) is not None):
            if waiting is not None:
                yield waiting
            waiting = None
            yield piece
        # <|im_end|> in Llama's vocabulary: the reference tokenises an unknown marker together with its text
        elif waiting is not None and waiting.supervised == piece.supervised:
            waiting = Piece("text", waiting.text + piece.text, piece.supervised)
        else:
            if waiting is not None:
                yield waiting
            waiting = Piece("text", piece.text, piece.supervised)
    if waiting is not None:
        yield waiting


@lru_cache(maxsize=512)  # a template's own pieces come with every sample and stay; contents pass through
def _encode_piece(tokenizer: Tokenizer, special: bool, text: str, after: Neighbour) -> tuple[_Ids, Neighbour]:
    index = tokenizer.special_id(text) if special else None
    if index is not None:
        return (index,), tokenizer.after_special(text)
    ids = tuple(tokenizer.encode(text, after))
    return ids, tokenizer.neighbour(ids)


def expand_pairs(pairs: Sequence[EncodedPair]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels with every visual token in place.

    Returns:
        Two int64 [L]; visual tokens are `IMAGE_TOKEN_INDEX` with the label `IGNORE_INDEX`.
    """
    ids = np.array([index for pair in pairs for index in pair.ids], dtype=np.int64)
    labels = np.array([label for pair in pairs for label in pair.labels], dtype=np.int64)
    places = np.flatnonzero(ids == IMAGE_TOKEN_INDEX)
    if not len(places):
        return ids, labels
    # every id once, an image's placeholder once for each of its visual tokens
    counts = np.ones(len(ids), dtype=np.int64)
    counts[places] = [count for pair in pairs for count in pair.visual]
    return np.repeat(ids, counts), np.repeat(labels, counts)
