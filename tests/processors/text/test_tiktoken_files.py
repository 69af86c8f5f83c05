"""`qwen.tiktoken`: ids are the ranks, bytes merge by the lowest rank, and a broken file is named by its line."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from paddlemix.errors import UserError
from paddlemix.processors.text.tiktoken_files import read_tiktoken

PIECES = [bytes([byte]) for byte in range(256)] + [b"ab", b"bc", b"abc"]


def write(path: Path, ranks: list[int]) -> Path:
    lines = [f"{base64.b64encode(piece).decode()} {rank}" for piece, rank in zip(PIECES, ranks, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_ids_are_ranks(tmp_path: Path) -> None:
    backend, roles = read_tiktoken(write(tmp_path / "qwen.tiktoken", list(range(len(PIECES)))))
    assert backend.encode("abc").ids == [258]
    assert backend.encode("abbc").ids == [256, 257]
    assert backend.encode("\u00e9").ids == [0xC3, 0xA9]  # also where it is written as e and an accent: NFC
    assert backend.encode("e\u0301").ids == [0xC3, 0xA9]
    assert backend.token_to_id(roles["eos_token"]) == len(PIECES)
    assert backend.decode([258]) == "abc"


def test_broken_files(tmp_path: Path) -> None:
    ranks = [*range(len(PIECES) - 1), len(PIECES)]
    with pytest.raises(UserError, match="259 tokens whose ranks are not 0 to 258, each once"):
        read_tiktoken(write(tmp_path / "qwen.tiktoken", ranks))
    (tmp_path / "qwen.tiktoken").write_text("YQ== 0\n?? 1\n")
    with pytest.raises(UserError, match="qwen.tiktoken line 2 is not 'base64 rank'"):
        read_tiktoken(tmp_path / "qwen.tiktoken")
