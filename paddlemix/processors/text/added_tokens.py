"""Tokens that were added to a vocabulary after its training, such as `[SEG]`, found in a text as the reference does.

A user's sentence may hold an added token: it is a word of the vocabulary like any other.  What a template or the
tokenizer itself uses to mark the structure of a prompt (`</s>`, `<|im_end|>`, `<image>`) is never found in a text.

Source: `tokenize` of transformers' PreTrainedTokenizer (tokenization_utils.py), for the order of matches and for what
`lstrip`, `rstrip` and `single_word` do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from paddlemix.processors.text.template import SPECIAL_TOKENS
from paddlemix.sample import IMAGE_TOKEN


@dataclass(frozen=True)
class AddedToken:
    """One token of the added vocabulary.

    Args:
        id: its row in the token embeddings.
        content: how it is written.
        lstrip, rstrip: whether it includes the white space before or after it.
        single_word: whether it is only found where white space or an end of the text surrounds it.
        drops_prefix: whether the space that opens a text is left out before it.
    """

    id: int
    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    drops_prefix: bool = False


class AddedTokens:
    """The added tokens that a text may hold.

    Args:
        tokens: in any order; the longest one wins where several match.
    """

    def __init__(self, tokens: Mapping[str, AddedToken]) -> None:
        self._tokens = dict(tokens)
        self.ids = frozenset(token.id for token in tokens.values())
        # alternatives are tried in order: a token that begins with another one has to come first
        longest_first = sorted(tokens, key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if tokens else None

    def __contains__(self, content: object) -> bool:
        return content in self._tokens

    def found_in(self, text: str) -> bool:
        """Whether the text holds one of them."""
        return self._pattern is not None and self._pattern.search(text) is not None

    def split(self, text: str) -> Iterator[str | AddedToken]:
        """The stretches of a text in order: added tokens, and the texts between them, none of them empty."""
        if self._pattern is None:
            yield text
            return
        parts: list[str | AddedToken] = [self._tokens.get(part, part) for part in self._pattern.split(text)]
        for place in range(1, len(parts), 2):  # every other part is a token, and texts, maybe empty, surround each
            token, left, right = parts[place], parts[place - 1], parts[place + 1]
            assert isinstance(token, AddedToken) and isinstance(left, str) and isinstance(right, str)
            right = right.lstrip() if token.rstrip else right
            left = left.rstrip() if token.lstrip else left
            # inside a word it is only characters: given back to the text around it
            if token.single_word and left and left[-1] != " ":  # the end of a word: characters of it
                left, parts[place] = left + token.content, ""
            elif token.single_word and right and right[0] != " ":
                right, parts[place] = token.content + right, ""
            parts[place - 1], parts[place + 1] = left, right
        yield from (part for part in parts if part != "")


def added_tokens(hf_tokenizer: Any) -> AddedTokens:
    """The added tokens of a tokenizer of transformers that a text may hold.

    Left out are the tokenizer's own roles (BOS, EOS, padding, unknown, ...), the image's placeholder, and what
    templates use as markers: in a text these are characters.
    """
    # every role but the list of further special tokens, where users' own tokens are
    roles = {
        token
        for name in hf_tokenizer.SPECIAL_TOKENS_ATTRIBUTES
        if name != "additional_special_tokens" and isinstance(token := getattr(hf_tokenizer, name, None), str)
    }
    # a user who types `</s>` must not end the conversation
    left_out = roles | set(SPECIAL_TOKENS) | {IMAGE_TOKEN}
    opening = set(hf_tokenizer.all_special_tokens)
    return AddedTokens(
        {
            token.content: AddedToken(
                index, token.content, token.lstrip, token.rstrip, token.single_word, token.content in opening
            )
            for index, token in hf_tokenizer.added_tokens_decoder.items()
            if token.content and token.content not in left_out
        }
    )
