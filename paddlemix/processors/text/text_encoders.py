"""A piece of text to ids as its place demands, over a SentencePiece model or a `tokenizer.json`.

Both kinds of vocabulary write a word with the space before it, and both add that space where a text begins.  A piece
that continues another must be encoded without it.  Neither finds a special token in a text.

Source: transformers' LlamaTokenizer for SentencePiece; the normalisers and pre-tokenisers of the `tokenizers` library
for `tokenizer.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from paddlemix.errors import UserError
from paddlemix.processors.text.added_tokens import AddedTokens
from paddlemix.processors.text.template import SPECIAL_TOKENS

Neighbour = Literal["start", "special", "text"]
SPACE = "\u2581"  # how SentencePiece writes a space
_GUARDS = ("\n", ">", "a")  # texts that open another one, of which one does not grow into it


@dataclass(frozen=True)
class SentencePieceRules:
    """How the reference's class reads a SentencePiece model.

    Args:
        legacy: the older rule: SentencePiece itself puts the first space, also after a special token.  Llama of 2023,
            Yi, InternLM and InternLM2 have it.
        prefixes: without `legacy`, whether a text that begins gets a space before it.
        unknown: the unknown token.
        named: tokens that are declared beside the model.
        added: those of them that a text may hold.
    """

    legacy: bool
    prefixes: bool
    unknown: str
    named: frozenset[str]
    added: AddedTokens


class SentencePieceEncoder:
    """Ids of the reference's slow tokenizers over a SentencePiece model.

    Args:
        model: a SentencePieceProcessor.
        rules: how it is read.

    Attributes:
        inside: special tokens that are pieces of the model and declared nowhere else; texts run on after them.
    """

    def __init__(self, model: Any, rules: SentencePieceRules) -> None:
        self._model, found = _without_named(model, rules.named | set(SPECIAL_TOKENS))
        self.inside = found - rules.named
        self._legacy, self._prefixes, self._added = rules.legacy, rules.prefixes, rules.added
        self._guards = (rules.unknown, "\n")

    def encode(self, text: str, after: Neighbour) -> list[int]:
        """Ids of a text that is not empty; `after` as in `Tokenizer.encode`."""
        ids: list[int] = []
        for part in self._added.split(text.replace(SPACE, " ")):
            if isinstance(part, str):
                ids += self._encode_plain(part, after)
                after = "text"
            else:
                if after == "start" and self._prefixes and not (self._legacy or part.drops_prefix):
                    ids += self._unprefixed(" ")  # the space that opens a text is a piece of its own before the token
                ids.append(part.id)
                after = "special"
        return ids

    def _encode_plain(self, text: str, after: Neighbour) -> list[int]:
        """`encode` of a text without added tokens."""
        if self._legacy:
            return self._unprefixed(text) if after == "text" else self._model.encode(text)
        if after == "start" and self._prefixes:
            text = " " + text
        return self._unprefixed(text) if text.startswith(" ") else self._model.encode(text)

    def _unprefixed(self, text: str) -> list[int]:
        """Ids of `text` exactly as written: SentencePiece adds or drops a space only at its very beginning, so a guard
        is put in front and its pieces are removed again.  Where the guard's end grows into the text (`>` and `=`),
        another one is tried."""
        # in this order: few vocabularies have a piece that joins a line break with a word
        for guard in self._guards:
            own = self._model.encode(guard)
            ids = self._model.encode(guard + text)
            if ids[: len(own)] == own:
                return ids[len(own) :]
        raise UserError(f"the tokenizer joins line breaks with the text {text[:20]!r} after them")


def _without_named(model: Any, named: frozenset[str]) -> tuple[Any, frozenset[str]]:
    """A model that never takes special tokens out of a text, the model itself where it would extract none; and
    those that it had.

    Yi and InternLM have theirs inside the model, as user-defined pieces, which it finds in any text.
    """
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model.serialized_model_proto())
    kinds = proto.SentencePiece
    found = [piece for piece in proto.pieces if piece.type == kinds.USER_DEFINED and piece.piece in named]
    for piece in found:
        piece.type = kinds.UNUSED
    changed = SentencePieceProcessor(model_proto=proto.SerializeToString()) if found else model
    return changed, frozenset(piece.piece for piece in found)


class FastEncoder:
    """Ids of a `tokenizer.json`: of byte-level vocabularies (Llama 3, Qwen), and of those that were made of a
    SentencePiece model (Yi, and llava-hf's copies).

    Args:
        description: content of the file.
        added: tokens that a text may hold; the others of the file are characters in it.
    """

    inside: frozenset[str] = frozenset()  # see `SentencePieceEncoder`

    def __init__(self, description: str, added: AddedTokens) -> None:
        values = json.loads(description)
        values["padding"] = values["truncation"] = None
        self._added = added
        for token in values.get("added_tokens") or ():
            token["special"] = token["content"] not in added  # special ones are not looked for, see `_backend`
        self._opening = self._continuing = _backend(values)
        scopes = [_stop_prefix(values, part) for part in ("normalizer", "pre_tokenizer")]
        self._prefixes_after_special = "always" in scopes
        if any(scopes):
            self._continuing = _backend(values)

    def encode(self, text: str, after: Neighbour) -> list[int]:
        """Ids of a text that is not empty; `after` as in `Tokenizer.encode`."""
        # after          -> a space is put before the text
        # start          -> as the file says
        # special        -> only where the file's rule holds for every stretch
        # text           -> never: the piece continues another
        opens = after == "start" or (after == "special" and self._prefixes_after_special)
        if opens or self._continuing is self._opening:
            return self._ids(self._opening, text)
        if not self._added.found_in(text):
            return self._ids(self._continuing, text)
        # After an added token the file's own rule for a space holds again, and an added token may have taken the space
        # before it along: only the whole description knows, so a guard opens the text and its ids are removed.
        for guard in _GUARDS:
            own, ids = self._ids(self._opening, guard), self._ids(self._opening, guard + text)
            if ids[: len(own)] == own:
                return ids[len(own) :]
        raise UserError(f"the tokenizer joins every start of a text with what follows it, here {text[:20]!r}")

    @staticmethod
    def _ids(backend: Any, text: str) -> list[int]:
        return list(backend.encode(text, add_special_tokens=False).ids)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for backend in (self._opening, self._continuing):
            backend.encode_special_tokens = True  # its pickle leaves this out; worker processes get one


def _backend(values: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(json.dumps(values))
    backend.encode_special_tokens = True  # as text
    return backend


def _stop_prefix(values: dict[str, Any], part: str) -> str:
    """Takes out of a tokenizer's description, in place, what puts a space before a text.

    Returns:
        "always" where every stretch between special tokens got one, "first" where only the first did, "" for none.
    """
    step = values.get(part)
    if step is None:
        return ""
    kind = step["type"]
    if kind == "Sequence":
        key = "normalizers" if part == "normalizer" else "pretokenizers"
        scopes = [_stop_prefix({part: inner}, part) for inner in step[key]]
        step[key] = [inner for inner in step[key] if inner["type"] != "Prepend"]
        return next((scope for scope in ("always", "first") if scope in scopes), "")
    if kind == "Prepend":
        values[part] = None
        return "always"
    if kind == "Metaspace" and step.get("prepend_scheme", "always") != "never":
        scope = str(step.get("prepend_scheme", "always"))
        step["prepend_scheme"] = "never"
        return scope
    if kind == "ByteLevel" and step.get("add_prefix_space"):
        step["add_prefix_space"] = False
        return "always"
    return ""
