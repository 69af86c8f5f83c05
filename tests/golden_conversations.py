"""The reference's ids and labels as test cases: those of a tokenizer of our own, and the real Llama's.

The Llama tokenizer is not ours to pass on: its cases are here where the folder `shared` beside the checkout has it.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from paddlemix.processors.text.tokenizer import Tokenizer

GOLDEN = Path(__file__).resolve().parent / "golden"
OWN = GOLDEN / "conversations_tiny"
LLAMA = Path(__file__).resolve().parents[2] / "shared" / "golden" / "llama_tokenizer"
VOCABULARIES = [OWN / "tokenizer", *([LLAMA] if LLAMA.is_dir() else [])]


def golden_cases() -> list[dict[str, Any]]:
    """Every case: `version`, `conversations`, `has_image`, `input_ids`, `labels` (null where the reference's masking
    is wrong), `legacy` and `vocabulary`, the folder of its tokenizer."""
    own = json.loads((OWN / "cases.json").read_text(encoding="utf-8"))["cases"]
    cases = [{**case, "vocabulary": OWN / "tokenizer"} for case in own]
    if LLAMA.is_dir():
        found = json.loads((GOLDEN / "conversations.json").read_text(encoding="utf-8"))
        cases += [{**case, "legacy": False, "vocabulary": LLAMA} for case in found if case["input_ids"] is not None]
    return cases


def case_name(case: dict[str, Any]) -> str:
    """For the list of tests."""
    rule = "legacy" if case["legacy"] else "new"
    return f"{case['vocabulary'].parent.name}-{rule}-{case['version']}-{len(case['input_ids'])}"


@cache
def golden_tokenizer(vocabulary: Path, legacy: bool) -> Tokenizer:
    """The tokenizer that a case was made with."""
    from transformers import LlamaTokenizer

    return Tokenizer(LlamaTokenizer.from_pretrained(str(vocabulary), legacy=legacy), vocabulary)
