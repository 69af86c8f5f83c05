"""Qwen's own vocabulary file, `qwen.tiktoken`: byte strings in base64, each with its rank, and no other file needed.

Read into a tokenizer of the `tokenizers` library; the code that comes with such a checkpoint is not run.  Qwen1.5 and
later have `vocab.json` and `merges.txt` instead, which transformers reads itself.

Source: Qwen/Qwen-7B tokenization_qwen.py for the pattern, the order of special tokens and NFC; openai/tiktoken for the
merging: of all neighbours the two whose joined bytes have the lowest rank.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from paddlemix.errors import UserError

_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END = "<|endoftext|>"
_SPECIAL = (_END, "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))


def read_tiktoken(path: Path) -> tuple[Any, dict[str, str]]:
    """Reads a `qwen.tiktoken`.

    Returns:
        A `tokenizers.Tokenizer`, and role -> token: `eos_token` and `pad_token`.

    Raises:
        UserError: a line is not "base64 rank", or the ranks are not 0, 1, 2 and so on.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    ranks = _read_ranks(path)
    spelled = {token: _spell(token) for token in ranks}
    backend = Tokenizer(
        models.BPE(
            vocab={spelled[token]: rank for token, rank in ranks.items()},
            merges=[(spelled[left], spelled[right]) for left, right in _merges(ranks)],
            # a word that is a token itself is that token, whatever merges lead to
            ignore_merges=True,
        )
    )
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    # their ids follow the ranks, in this order
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    return backend, {"eos_token": _END, "pad_token": _END}


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(f"{path.name} line {number} is not 'base64 rank': {line[:60]!r}") from error
    # ranks are token ids: a gap would shift every id after it
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{path.name} has {len(ranks)} tokens whose ranks are not 0 to {len(ranks) - 1}, each once")
    return ranks


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every way to join two tokens into a third, by the third's rank."""
    merges = []
    # The file has no merges; with all possible ones in rank order BPE merges as tiktoken does.
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        found = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(found, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def _byte_letters() -> dict[int, str]:
    """The visible letter that byte-level vocabularies write for each byte.  Source: GPT-2's `bytes_to_unicode`."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), 256)]
    # bytes without a visible letter get one from beyond Latin-1, in ascending order
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


_LETTERS = _byte_letters()


def _spell(token: bytes) -> str:
    return "".join(_LETTERS[byte] for byte in token)
