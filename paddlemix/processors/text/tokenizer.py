"""Text to token ids and back, over the tokenizer files of a checkpoint.

Gives the ids of the reference's tokenizer for pieces of text whose neighbourhood is known, so that a caller can build
ids and labels side by side.  Knows no template and no image.  Special tokens are never parsed out of text: `</s>`
inside a user's sentence is four characters.  Words that were added to the vocabulary are: see `added_tokens.py`.

Which files are read, the first that are there: a SentencePiece `tokenizer.model`, `tokenizer.json`, `vocab.json` with
`merges.txt`, `*.tiktoken`.  InternLM and InternLM2 have a class of their own that comes as code with the checkpoint; no
such code is run, because their ids are those of the legacy rule over `tokenizer.model`.

Source: transformers' LlamaTokenizer (legacy and non-legacy prefix rule); InternLM's tokenization_internlm.py.
"""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from paddlemix.cache import cache_key
from paddlemix.errors import MissingFileError, UserError
from paddlemix.lfs import refuse_pointer
from paddlemix.log import logger
from paddlemix.processors.text.added_tokens import added_tokens
from paddlemix.processors.text.text_encoders import (
    SPACE,
    FastEncoder,
    Neighbour,
    SentencePieceEncoder,
    SentencePieceRules,
)
from paddlemix.processors.text.tiktoken_files import read_tiktoken
from paddlemix.processors.text.tokenizer_keys import loading_options, read_tokenizer_config

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "qwen.tiktoken",
)
_SENTENCEPIECE, _FAST, _TIKTOKEN = "tokenizer.model", "tokenizer.json", "qwen.tiktoken"


class Tokenizer:
    """Token ids of one checkpoint's vocabulary.

    Args:
        hf_tokenizer: a tokenizer object of transformers.
        directory: where its files are, to copy them with a checkpoint; None when it has no files.
    """

    def __init__(self, hf_tokenizer: Any, directory: Path | None = None) -> None:
        self._hf = hf_tokenizer
        self._legacy = bool(getattr(hf_tokenizer, "legacy", False))
        declared = hf_tokenizer.added_tokens_decoder
        self._special_ids = {index for index in hf_tokenizer.all_special_ids if index is not None}
        self._special_ids |= {index for index, token in declared.items() if token.special}
        # None for SentencePiece, whose pieces cannot be mistaken for special tokens
        self._named = None if hasattr(hf_tokenizer, "sp_model") else {token.content for token in declared.values()}
        self.directory = directory
        self.bos_token_id: int | None = hf_tokenizer.bos_token_id if _adds_bos(hf_tokenizer) else None
        self.eos_token_id: int = hf_tokenizer.eos_token_id
        if self.eos_token_id is None:
            raise UserError(f"the tokenizer in {directory} names no eos_token; add it to tokenizer_config.json")
        # padding: its own token, else the unknown one, else the end; its label is ignored, so which one does not matter
        pad = hf_tokenizer.pad_token_id
        unk = hf_tokenizer.unk_token_id
        self.pad_token_id: int = next(index for index in (pad, unk, self.eos_token_id) if index is not None)
        self._added = added_tokens(hf_tokenizer)
        self._encoder = self._make_encoder()

    def _make_encoder(self) -> SentencePieceEncoder | FastEncoder:
        if self._named is not None:
            return FastEncoder(self._hf.backend_tokenizer.to_str(), self._added)
        rules = SentencePieceRules(
            legacy=self._legacy,
            prefixes=bool(self._hf.add_prefix_space),
            unknown=str(self._hf.unk_token),
            named=frozenset(self._hf.added_tokens_encoder),
            added=self._added,
        )
        return SentencePieceEncoder(self._hf.sp_model, rules)

    def __len__(self) -> int:
        """Number of token ids, added tokens included."""
        return len(self._hf)

    @property
    def num_rows(self) -> int:
        """Rows that an embedding needs for these ids.  Padding that was added after all others needs none: no text has
        it, and what pads a batch is never looked up."""
        last, others = len(self) - 1, (self._hf.bos_token_id, self._hf.eos_token_id, self._hf.unk_token_id)
        padding = self._hf.pad_token_id == last and last not in others and last in self._hf.added_tokens_decoder
        return last if padding else last + 1

    @cached_property
    def fingerprint(self) -> str:
        """Differs between tokenizers that return different ids."""
        if self.directory is None:
            return cache_key(sorted(self._hf.get_vocab().items()), self._legacy)
        # by content: a copy of the files elsewhere keeps cached lengths valid
        files = [self.directory / name for name in TOKENIZER_FILES]
        return cache_key(*(hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()))

    def encodes_like(self, other: Tokenizer) -> bool:
        """Whether both have the same vocabulary, rules and special tokens, however their files say it."""
        return self._rules() == other._rules()

    def _rules(self) -> tuple[Any, ...]:
        hf, is_fast = self._hf, self._named is not None
        return (
            (is_fast, self._legacy, self.bos_token_id, bool(getattr(hf, "add_prefix_space", True))),
            (hf.special_tokens_map, sorted(self._special_ids)),
            {
                index: (token.content, token.lstrip, token.rstrip, token.single_word)
                for index, token in hf.added_tokens_decoder.items()
            },
            hf.backend_tokenizer.to_str() if is_fast else hf.sp_model.serialized_model_proto(),
        )

    def encode(self, text: str, after: Neighbour = "start") -> list[int]:
        """Token ids of a piece of text, without BOS or EOS.

        Args:
            text: any text; nothing in it is a special token, but added tokens are found.
            after: what precedes it: "start" of a sequence or of the text after an image (a word there gets the
                leading space of a word), a "special" token, or "text" that this piece continues.

        Returns:
            The ids that the reference's tokenizer returns for this piece in that place.
        """
        return self._encoder.encode(text, after) if text else []

    def special_id(self, token: str) -> int | None:
        """Id of a special or added token such as `</s>`; None where the vocabulary has no such token.  A byte-level
        vocabulary may have ordinary pieces that are spelled like one, which are none."""
        if self._named is not None and token not in self._named:
            return None
        index = self._hf.convert_tokens_to_ids(token)
        # the library answers with the unknown token's id for what it does not know
        if index is None or (index == self._hf.unk_token_id and token != self._hf.unk_token):
            return None
        return int(index)

    def after_special(self, token: str) -> Neighbour:
        """What a text after this special token is encoded after: "text" where the token is a piece like any other to
        the reference (InternLM's `<eoh>` and `<eoa>`)."""
        return "text" if token in self._encoder.inside else "special"

    def neighbour(self, ids: Sequence[int]) -> Neighbour:
        """What a text that follows these ids of `encode` is encoded after: "special" if they end in an added token."""
        return "special" if ids and ids[-1] in self._added.ids else "text"

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; with `skip_special_tokens`, BOS, EOS and padding leave no trace.  Ids that only a model with a
        padded vocabulary has never leave one."""
        left_out = self._special_ids if skip_special_tokens else frozenset()
        # a padded vocabulary has rows without a token; an untrained model may answer with one
        ids = [index for index in ids if index < len(self) and index not in left_out]
        text = self._hf.decode(ids, clean_up_tokenization_spaces=False) if ids else ""
        return (
            text.replace(SPACE, " ") if self._named is None else text
        )  # a run of spaces without a piece stays as it is

    def save(self, directory: Path) -> None:
        """Writes the tokenizer's files: copies of the originals, so that nothing is re-encoded on the way."""
        if self.directory is None:
            self._hf.save_pretrained(str(directory))
            return
        for name in TOKENIZER_FILES:
            source = self.directory / name
            if source.is_file():
                (directory / name).write_bytes(source.read_bytes())


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory has tokenizer files."""
    return any((directory / name).is_file() for name in (_SENTENCEPIECE, _FAST, "vocab.json", _TIKTOKEN))


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Reads the tokenizer files of a checkpoint directory.

    Args:
        directory: holds `tokenizer.model` (SentencePiece), `tokenizer.json`, `vocab.json` with `merges.txt`, or
            `qwen.tiktoken`, best with `tokenizer_config.json`.

    Raises:
        MissingFileError: none of them is there.
        UserError: the files cannot be read as a tokenizer.
    """
    directory = Path(directory)
    if not has_tokenizer(directory):
        raise MissingFileError(
            f"no tokenizer in {directory}: expected tokenizer.model or tokenizer.json; copy them from the base model"
        )
    for name in TOKENIZER_FILES:
        refuse_pointer(directory / name, f"'{directory / name}'")
        _refuse_byte_order_mark(directory / name)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns that torch is absent, which is intended
    try:
        return Tokenizer(_load(directory), directory)
    except UserError:
        raise
    except Exception as error:  # the library raises whatever its parsers raise: all of it means a bad file
        raise UserError(f"the tokenizer files in {directory} cannot be read: {error}") from error


def _refuse_byte_order_mark(path: Path) -> None:
    """We could read such a file, but transformers, which loads the tokenizer, cannot."""
    if path.suffix != ".json" or not path.is_file():
        return
    with path.open("rb") as file:
        if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
            raise UserError(f"'{path}' begins with a byte order mark; save it as UTF-8 without one")


def _load(directory: Path) -> Any:
    """A tokenizer of transformers, whatever files there are."""
    # files                              -> class
    # tokenizer.model that is SentencePiece -> Llama's slow one, whatever else there is
    # tokenizer.json, or vocab.json      -> the fast one that tokenizer_config.json names
    # qwen.tiktoken                      -> read here
    is_sentencepiece = (directory / _SENTENCEPIECE).is_file() and _is_sentencepiece(directory / _SENTENCEPIECE)
    if is_sentencepiece or not any((directory / name).is_file() for name in (_FAST, "vocab.json", _TIKTOKEN)):
        return _load_sentencepiece(directory)
    if (directory / _FAST).is_file() or (directory / "vocab.json").is_file():
        return _load_fast(directory)
    from transformers import PreTrainedTokenizerFast

    backend, roles = read_tiktoken(directory / _TIKTOKEN)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def _is_sentencepiece(path: Path) -> bool:
    """Whether a `tokenizer.model` holds pieces; Meta's own Llama 3 has a file of that name that is none."""
    with path.open("rb") as file:
        return file.read(1) == b"\n"  # the tag of a message's first field


def _load_sentencepiece(directory: Path) -> Any:
    from transformers import LlamaTokenizer

    declared = read_tokenizer_config(directory)
    options = loading_options(declared, LlamaTokenizer.__init__)
    if not declared:
        options["legacy"] = False
        _tell_legacy(directory)
    return LlamaTokenizer.from_pretrained(str(directory), local_files_only=True, **options)


@cache
def _tell_legacy(directory: Path) -> None:
    logger.warning(
        "%s has no tokenizer_config.json: text is encoded by the newer rule of Llama's vocabularies (legacy false), as "
        "Vicuna's files declare it, where transformers would use the older one; copy the file from the base model",
        directory,
    )


def _load_fast(directory: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    declared = read_tokenizer_config(directory)
    kind = _fast_class(declared.get("tokenizer_class"))
    has_json, with_code = (directory / _FAST).is_file(), "AutoTokenizer" in (declared.get("auto_map") or {})
    if not has_json and declared.get("tokenizer_class") is None:
        raise UserError(
            f"vocab.json in {directory} does not say how text is cut into words; add tokenizer_config.json of the "
            'base model, or at least its "tokenizer_class", such as Qwen2Tokenizer'
        )
    # a class that comes as code with the checkpoint, or one of a later transformers, says nothing beyond tokenizer.json
    if has_json and (with_code or (kind is None and declared.get("tokenizer_class") is not None)):
        options = loading_options(declared, PreTrainedTokenizerFast.__init__)
        return PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True, **options)
    options = loading_options(declared, (kind or PreTrainedTokenizerFast).__init__)
    return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False, **options)


def _fast_class(name: str | None) -> Any:
    """The class of transformers over tokenizer.json that goes by a name, None where there is none."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    names = () if name is None else (name, f"{name}Fast") if name.endswith("Fast") else (f"{name}Fast", name)
    return next((found for found in map(tokenizer_class_from_name, names) if found is not None), None)


def _adds_bos(hf_tokenizer: Any) -> bool:
    """Asked of the tokenizer's own output: only the slow classes have the flag `add_bos_token`."""
    begin = hf_tokenizer.bos_token_id
    return begin is not None and hf_tokenizer.encode("a")[:1] == [begin]
