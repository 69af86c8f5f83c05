"""What ends an answer: tokens where the vocabulary has one for it, texts otherwise; and an answer as it grows.

A template's end may be the end-of-sequence token, another special token or plain text such as `###`.  Knows no model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from paddlemix.processors.llava import LlavaProcessor
from paddlemix.processors.text.template import SPECIAL_TOKENS
from paddlemix.processors.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # what half a character decodes to
_TOKENS_OF_CHARACTER = 4  # most, where a vocabulary writes it byte by byte
_CONTEXT = 4  # tokens before a text that make its first token's space come out right


@dataclass(frozen=True)
class Ending:
    """What ends an answer.

    Args:
        ids: tokens.
        texts: none of them belongs to the answer, nor does anything after them.
    """

    ids: frozenset[int]
    texts: tuple[str, ...]

    def cut(self, text: str) -> tuple[str, bool]:
        """The text up to the first end, and whether there is one."""
        places = [place for end in self.texts if (place := text.find(end)) >= 0]
        return (text[: min(places)], True) if places else (text, False)

    def certain_length(self, text: str) -> int:
        """Characters that later tokens cannot change: no half character and no beginning of an end follows them."""
        length = len(text.rstrip(_REPLACEMENT))
        for end in self.texts:
            # the longest beginning of an end that the text ends with is held back
            for size in range(len(end) - 1, 0, -1):
                if text.endswith(end[:size]):
                    length = min(length, len(text) - size)
                    break
        return length

    def reached(self, tokenizer: Tokenizer) -> Callable[[Sequence[int]], bool] | None:
        """Whether an answer's tokens end with one of the texts; None where tokens alone end it."""
        if not self.texts:
            return None
        # tokens that can spell the longest end, byte by byte at worst: no more of a long answer is decoded
        count = _CONTEXT + _TOKENS_OF_CHARACTER * max(map(len, self.texts))
        return lambda tokens: self.cut(tokenizer.decode(tokens[-count:]))[1]


def ending_of(processor: LlavaProcessor, stop: Sequence[str] = ()) -> Ending:
    """The tokenizer's end of sequence, those that the model's files declare, the template's, and further texts."""
    tokenizer, template = processor.tokenizer, processor.template
    ids, texts = {tokenizer.eos_token_id, *processor.end_ids}, []
    for end in (template.end, *template.stop):
        # a template's end        -> ends an answer as
        # a token the vocabulary has -> that id
        # any other text          -> this text, wherever it occurs
        special = next((token for token in SPECIAL_TOKENS if end.startswith(token)), None)
        index = tokenizer.special_id(special) if special is not None else None
        if index is not None:
            ids.add(index)
        elif end:
            texts.append(special or end)
    return Ending(frozenset(ids), tuple(dict.fromkeys([*texts, *stop])))


class GrowingText:
    """The text of an answer, token by token; only the last tokens are decoded again.

    Args:
        tokenizer: of the tokens.
        ending: what is cut off.
    """

    def __init__(self, tokenizer: Tokenizer, ending: Ending) -> None:
        self._tokenizer, self._ending = tokenizer, ending
        self._tokens: list[int] = []
        self._settled, self._settled_count = (
            "",
            0,
        )  # the text of the first `_settled_count` tokens, which later ones cannot change
        self._places = deque([0], maxlen=_CONTEXT + 1)  # earlier values of `_settled_count`: no character is cut there
        self._shown = 0
        self.text, self.ended = "", False

    def add(self, token: int) -> str:
        """What of the text has become certain with this token; `ended` and `text` are then up to date."""
        self._tokens.append(token)
        # Decoded with some tokens before it, because a tokenizer drops or adds a space at the very beginning.
        start = next((place for place in reversed(self._places) if place <= self._settled_count - _CONTEXT), 0)
        before = self._tokenizer.decode(self._tokens[start : self._settled_count])
        new = self._tokenizer.decode(self._tokens[start:])[len(before) :]
        whole = self._settled + new
        if not new.endswith(_REPLACEMENT):
            self._settled, self._settled_count = whole, len(self._tokens)
            self._places.append(self._settled_count)
        self.text, self.ended = self._ending.cut(whole.lstrip())
        # shown at once is only what stays: half a character, or "##" that may become the end "###", waits
        certain = len(self.text) if self.ended else self._ending.certain_length(self.text)
        return self._show(certain)

    def rest(self) -> str:
        """What was held back, when nothing follows."""
        return self._show(len(self.text))

    def _show(self, length: int) -> str:
        piece, self._shown = self.text[self._shown : length], max(self._shown, length)
        return piece
