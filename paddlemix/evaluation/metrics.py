"""How well answers agree with reference answers: exact match and ROUGE-L.

Plain Python on texts; knows no model and no file.  A number lies in 0..1, 1 is best.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# CJK is written without spaces: each of its characters counts as a word.
_CJK = "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]"
_WORDS = re.compile(rf"{_CJK}|(?:(?!{_CJK})[^\W_])+")
_TRAILING = ".。!！?？"


def exact_match(answer: str, reference: str) -> float:
    """1.0 where two texts are equal but for case, spaces and final punctuation, else 0.0."""
    return float(_plain(answer) == _plain(reference))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(_TRAILING).rstrip()


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words; case and punctuation do not count, a CJK character is a word.

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3.1, with beta 1.

    Returns:
        0..1; for two texts without any word whether they match exactly.
    """
    own, wanted = words(answer), words(reference)
    if not own or not wanted:
        # texts of punctuation or emoji alone have no word to compare
        return exact_match(answer, reference) if not own and not wanted else 0.0
    return 2 * _common_length(own, wanted) / (len(own) + len(wanted))


def words(text: str) -> list[str]:
    """The words that ROUGE compares: lower case, without punctuation, each CJK character a word."""
    return _WORDS.findall(text.casefold())


def _common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for place, other in enumerate(second, 1):
            # one row of the table is enough: `diagonal` keeps what the step before has overwritten
            above = row[place]
            row[place] = diagonal + 1 if word == other else max(above, row[place - 1])
            diagonal = above
    return row[-1]
