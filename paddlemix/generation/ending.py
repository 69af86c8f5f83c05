"""What ends an answer: tokens where the vocabulary has one for it, texts otherwise.

A template's end may be the end-of-sequence token, another special token or plain text such as `###`.  Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass

from paddlemix.processors.llava import LlavaProcessor
from paddlemix.processors.templates import SPECIAL_TOKENS

_REPLACEMENT = "\ufffd"  # what half a character decodes to


@dataclass(frozen=True)
class Ending:
    """What ends an answer.

    Args:
        ids: tokens.
        texts: none of them belongs to the answer, nor does anything behind them.
    """

    ids: frozenset[int]
    texts: tuple[str, ...]

    def cut(self, text: str) -> tuple[str, bool]:
        """The text up to the first end, and whether there is one."""
        places = [place for end in self.texts if (place := text.find(end)) >= 0]
        return (text[: min(places)], True) if places else (text, False)

    def certain_length(self, text: str) -> int:
        """Characters that later tokens cannot change: no half character and no beginning of an end behind them."""
        length = len(text.rstrip(_REPLACEMENT))
        for end in self.texts:
            for size in range(len(end) - 1, 0, -1):
                if text.endswith(end[:size]):
                    length = min(length, len(text) - size)
                    break
        return length


def ending_of(processor: LlavaProcessor) -> Ending:
    """The tokenizer's end of sequence and what the template says."""
    tokenizer, template = processor.tokenizer, processor.template
    ids, texts = {tokenizer.eos_token_id}, []
    for end in (template.end, *template.stop):
        special = next((token for token in SPECIAL_TOKENS if end.startswith(token)), None)
        index = tokenizer.special_id(special) if special is not None else None
        if index is not None:
            ids.add(index)
        elif end:
            texts.append(special or end)
    return Ending(frozenset(ids), tuple(texts))
