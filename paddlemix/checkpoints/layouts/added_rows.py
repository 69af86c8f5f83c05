"""The rows that llava-hf adds to a vocabulary, `<image>`, `<pad>` and padding, taken off and put back bit for bit.

The other layouts have no such rows.  A small file that travels with a converted checkpoint keeps them and says which
ids they had; a checkpoint that never was llava-hf gets new ones when it becomes one.
Source: transformers' convert_llava_weights_to_hf.py, which pads 32000 rows to 32064, `<image>` first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from paddlemix.checkpoints.files.tensors import TensorEntry, array_entry, convert, converted, joined, selected
from paddlemix.checkpoints.files.weight_files import read_metadata, read_safetensors
from paddlemix.checkpoints.layouts.config_keys import BASE_KEY
from paddlemix.declared import without_null
from paddlemix.errors import UserError, cut
from paddlemix.json_files import read_object

HF_VOCABULARY_FILE = "hf_vocabulary.safetensors"
IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
_MULTIPLE = 64
_SHOWN = 200  # characters of a reason in an error
# name of a matrix with one row or column per token -> the axis of the tokens
_TOKEN_AXES = {"language_model.embed_tokens.weight": 0, "lm_head.weight": 1}


@dataclass(frozen=True)
class HfVocabulary:
    """What a llava-hf checkpoint has beyond the vocabulary of its language model.

    Args:
        base: rows of the language model's own vocabulary.
        image_token: id of `<image>`.
        rows: the added rows of the embedding and columns of the output layer, under our names; empty for none.
    """

    base: int
    image_token: int
    rows: dict[str, TensorEntry] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """All rows."""
        return self.base + next((entry.shape[_TOKEN_AXES[name]] for name, entry in self.rows.items()), 0)

    def metadata(self) -> dict[str, str]:
        """What the file that travels along declares besides its tensors."""
        return {"base": str(self.base), "image_token": str(self.image_token)}


def split_added_rows(
    config: Mapping[str, Any], directory: Path, tensors: Mapping[str, TensorEntry], vocab_size: int
) -> tuple[dict[str, TensorEntry], HfVocabulary]:
    """Separates a llava-hf checkpoint's added rows, where its files declare that there are some.

    Args:
        config: its config.json.
        directory: holds its tokenizer files.
        tensors: under our names.
        vocab_size: rows of its embedding.
    """
    # | where the added rows begin             | known from                                    |
    # |----------------------------------------|-----------------------------------------------|
    # | BASE_KEY of config.json                | our own conversion                            |
    # | at `<image>`, right after the pieces   | the tokenizer's files                         |
    # | nowhere: there are none                | a vocabulary that always had room for `<image>`|
    config = without_null(config)
    image_token = int(config.get("image_token_index", config.get("image_token_id", vocab_size)))
    base = int(config.get(BASE_KEY) or _declared_base(directory, image_token, vocab_size))
    kept, rows = dict(tensors), {}
    for name, axis in _TOKEN_AXES.items():
        if base < vocab_size and name in tensors:
            kept[name] = selected(tensors[name], slice(0, base), axis)
            rows[name] = selected(tensors[name], slice(base, vocab_size), axis)
    return kept, HfVocabulary(base, image_token, rows)


def without_added_rows(tensors: Mapping[str, TensorEntry], added: HfVocabulary) -> dict[str, TensorEntry]:
    """Some of a checkpoint's weights; an embedding or output layer among them loses the rows that llava-hf added."""
    return {
        name: selected(entry, slice(0, added.base), _TOKEN_AXES[name])
        if name in added.rows and entry.shape[_TOKEN_AXES[name]] > added.base
        else entry
        for name, entry in tensors.items()
    }


def _declared_base(directory: Path, image_token: int, vocab_size: int) -> int:
    """Rows before `<image>` if the tokenizer declares that it and at most padding were added after its own pieces.

    A larger vocabulary had room for `<image>` from the beginning, as Qwen's has: nothing was added.
    """
    if vocab_size > _rounded_up(image_token + 2):
        return vocab_size
    pieces, added = _num_pieces(directory), read_added_tokens(directory)
    after = {content for content, index in added.items() if index >= image_token}
    declared = added.get(IMAGE_TOKEN) == image_token and after <= {IMAGE_TOKEN, PAD_TOKEN}
    return image_token if declared and pieces is not None and pieces <= image_token < vocab_size else vocab_size


def _num_pieces(directory: Path) -> int | None:
    """Size of the tokenizer without added tokens; None without a tokenizer."""
    with _understood(f"the tokenizer of {directory}"):
        if (directory / "tokenizer.model").is_file():
            import sentencepiece  # here, because few checkpoints need it

            pieces = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
            return int(pieces.get_piece_size())
        if (directory / "tokenizer.json").is_file():
            return len(_read(directory / "tokenizer.json")["model"]["vocab"])
        if (directory / "vocab.json").is_file():
            return len(_read(directory / "vocab.json"))
    return None


def read_added_tokens(directory: Path) -> dict[str, int]:
    """Token -> id of every token that the tokenizer's files add by name.

    Raises:
        UserError: a file cannot be understood.
    """
    with _understood(f"the tokenizer of {directory}"):
        added = {token: int(index) for token, index in _read(directory / "added_tokens.json").items()}
        declared = _read(directory / "tokenizer_config.json").get("added_tokens_decoder", {})
        added |= {token["content"]: int(index) for index, token in declared.items()}
        for token in _read(directory / "tokenizer.json").get("added_tokens", ()):
            added[token["content"]] = int(token["id"])
    return added


@contextlib.contextmanager
def _understood(what: str) -> Iterator[None]:
    """Turns any error of a reader that meets a damaged file into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
        raise UserError(f"{what} cannot be understood ({cut(repr(error), _SHOWN)}); copy it again") from error


def _read(path: Path) -> dict[str, Any]:
    return without_null(read_object(path)) if path.is_file() else {}


def read_carried_vocabulary(directory: Path, vocab_size: int) -> HfVocabulary | None:
    """What the file that travels along declares; None without one, or if it belongs to another vocabulary.

    Raises:
        UserError: it is damaged.
    """
    path = directory / HF_VOCABULARY_FILE
    if not path.is_file():
        return None
    metadata, rows = read_metadata(path), read_safetensors(path)
    with _understood(f"'{path}'"):
        known = HfVocabulary(int(metadata["base"]), int(metadata["image_token"]), rows)
        if any(name not in _TOKEN_AXES or len(entry.shape) != 2 for name, entry in rows.items()):
            raise ValueError(f"rows of {', '.join(rows)}")
    # another vocabulary: tokens were added after the conversion, and these rows are not theirs
    return known if known.base == vocab_size else None


def choose_vocabulary(directory: Path, tensors: Mapping[str, TensorEntry], vocab_size: int) -> HfVocabulary:
    """The added rows for a checkpoint that becomes llava-hf.

    Those it was converted from; else none if its tokenizer has `<image>` within the vocabulary; else new ones, each the
    mean of all rows, up to a multiple of 64 as in llava-hf.
    """
    carried = read_carried_vocabulary(directory, vocab_size)
    if carried is not None:
        return carried
    image_token = read_added_tokens(directory).get(IMAGE_TOKEN)
    if image_token is not None and image_token < vocab_size:
        return HfVocabulary(vocab_size, image_token)
    count = _rounded_up(vocab_size + 2) - vocab_size
    rows = {name: _mean_rows(tensors[name], axis, count) for name, axis in _TOKEN_AXES.items() if name in tensors}
    return HfVocabulary(vocab_size, vocab_size, rows)


def _rounded_up(rows: int) -> int:
    return -(-rows // _MULTIPLE) * _MULTIPLE


def _mean_rows(entry: TensorEntry, axis: int, count: int) -> TensorEntry:
    # The mean is computed in float32 and rounded once: a sum of 32,000 numbers in 16 bits would be worthless.
    matrix = entry.read()
    wide = convert(matrix, "BF16", "F32") if entry.dtype == "BF16" else matrix
    mean = wide.mean(axis=axis, dtype=np.float32, keepdims=True).astype(np.float32)
    narrow = convert(mean, "F32", entry.dtype)
    return array_entry(np.repeat(narrow, count, axis=axis), entry.dtype)


def append_added_rows(tensors: Mapping[str, TensorEntry], added: HfVocabulary) -> dict[str, TensorEntry]:
    """Tensors with the added rows after their own."""
    return {
        name: joined(entry, converted(added.rows[name], entry.dtype), _TOKEN_AXES[name])
        if name in added.rows
        else entry
        for name, entry in tensors.items()
    }
