"""Text to token ids and back, over the tokenizer files of a checkpoint.

Gives the ids of the reference's tokenizer for pieces of text whose neighbourhood is known, so that a caller can build
ids and labels side by side.  Knows no template and no image.  Special tokens are never parsed out of text: `</s>`
inside a user's sentence is four characters.

Source: transformers' LlamaTokenizer (legacy and non-legacy prefix rule).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from paddlemix.cache import cache_key
from paddlemix.errors import MissingFileError, UserError

Neighbour = Literal["start", "special", "text"]
_SPACE = "\u2581"  # how SentencePiece writes a space
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


class Tokenizer:
    """Token ids of one checkpoint's vocabulary.

    Args:
        hf_tokenizer: a tokenizer object of transformers.
        directory: where its files are, to copy them with a checkpoint; None when it has no files.
    """

    def __init__(self, hf_tokenizer: Any, directory: Path | None = None) -> None:
        self._hf = hf_tokenizer
        self._sentencepiece: Any = getattr(hf_tokenizer, "sp_model", None)
        self._legacy = bool(getattr(hf_tokenizer, "legacy", False))
        self._special_ids = {index for index in hf_tokenizer.all_special_ids if index is not None}
        self.directory = directory
        self.bos_token_id: int | None = hf_tokenizer.bos_token_id if _adds_bos(hf_tokenizer) else None
        self.eos_token_id: int = hf_tokenizer.eos_token_id
        if self.eos_token_id is None:
            raise UserError(f"the tokenizer in {directory} names no eos_token; add it to tokenizer_config.json")
        pad = hf_tokenizer.pad_token_id
        unk = hf_tokenizer.unk_token_id
        self.pad_token_id: int = next(index for index in (pad, unk, self.eos_token_id) if index is not None)

    def __len__(self) -> int:
        """Number of token ids, added tokens included."""
        return len(self._hf)

    @cached_property
    def fingerprint(self) -> str:
        """Differs between tokenizers that give different ids."""
        if self.directory is None:
            return cache_key(sorted(self._hf.get_vocab().items()), self._legacy)
        files = [self.directory / name for name in TOKENIZER_FILES]
        return cache_key(*(hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()))

    def encode(self, text: str, after: Neighbour = "start") -> list[int]:
        """Token ids of a piece of text, without BOS or EOS.

        Args:
            text: any text; nothing in it is a special token.
            after: what stands before it: "start" of a sequence or of the text behind an image (a word there gets the
                leading space of a word), a "special" token, or "text" that this piece continues.

        Returns:
            The ids that the reference's tokenizer gives this piece in that place.
        """
        if not text:
            return []
        if self._sentencepiece is None:
            return self._hf.encode(text, add_special_tokens=False, split_special_tokens=True)
        text = text.replace(_SPACE, " ")
        if after == "start" or (after == "special" and self._legacy):
            text = " " + text
        if self._legacy:  # SentencePiece itself puts the first space there
            return self._encode_unprefixed(text) if after == "text" else self._sentencepiece.encode(text[1:])
        return self._encode_unprefixed(text) if text.startswith(" ") else self._sentencepiece.encode(text)

    def _encode_unprefixed(self, text: str) -> list[int]:
        """Ids of `text` exactly as written: SentencePiece adds or drops a space only at its very beginning, so a guard
        is put in front and its pieces are taken away again.  Where the guard's end grows into the text (`>` and `=`),
        another one is taken."""
        for guard in (str(self._hf.unk_token), "\n"):
            own = self._sentencepiece.encode(guard)
            ids = self._sentencepiece.encode(guard + text)
            if ids[: len(own)] == own:
                return ids[len(own) :]
        raise UserError(f"the tokenizer in {self.directory} joins line breaks with the text {text[:20]!r} behind them")

    def special_id(self, token: str) -> int | None:
        """Id of a special or added token such as `</s>`; None where the vocabulary has no such token."""
        index = self._hf.convert_tokens_to_ids(token)
        if index is None or (index == self._hf.unk_token_id and token != self._hf.unk_token):
            return None
        return int(index)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; with `skip_special_tokens`, BOS, EOS and padding leave no trace.  Ids that only a model with a
        padded vocabulary has never leave one."""
        left_out = self._special_ids if skip_special_tokens else frozenset()
        ids = [index for index in ids if index < len(self) and index not in left_out]
        return self._hf.decode(list(ids), clean_up_tokenization_spaces=False) if len(ids) else ""

    def save(self, directory: Path) -> None:
        """Writes the tokenizer's files: copies of the originals, so that nothing is re-encoded on the way."""
        if self.directory is None:
            self._hf.save_pretrained(str(directory))
            return
        for name in TOKENIZER_FILES:
            source = self.directory / name
            if source.is_file():
                (directory / name).write_bytes(source.read_bytes())


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Reads the tokenizer files of a checkpoint directory.

    Args:
        directory: holds `tokenizer.model` (SentencePiece) or `tokenizer.json`, best with `tokenizer_config.json`.

    Raises:
        MissingFileError: neither file is there.
        UserError: the files cannot be read as a tokenizer.
    """
    directory = Path(directory)
    has_sentencepiece = (directory / "tokenizer.model").is_file()
    if not has_sentencepiece and not (directory / "tokenizer.json").is_file():
        raise MissingFileError(
            f"no tokenizer in {directory}: expected tokenizer.model or tokenizer.json; copy them from the base model"
        )
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns that torch is absent, which is intended
    try:
        return Tokenizer(_load_sentencepiece(directory) if has_sentencepiece else _load_fast(directory), directory)
    except UserError:
        raise
    except Exception as error:  # the library raises whatever its parsers raise: all of it means a bad file
        raise UserError(f"the tokenizer files in {directory} cannot be read: {error}") from error


def _load_sentencepiece(directory: Path) -> Any:
    from transformers import LlamaTokenizer

    options: dict[str, Any] = {} if (directory / "tokenizer_config.json").is_file() else {"legacy": False}
    return LlamaTokenizer.from_pretrained(str(directory), local_files_only=True, **options)


def _load_fast(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)


def _adds_bos(hf_tokenizer: Any) -> bool:
    """Asked of the tokenizer's own output: only the slow classes have the flag `add_bos_token`."""
    begin = hf_tokenizer.bos_token_id
    return begin is not None and hf_tokenizer.encode("a")[:1] == [begin]
