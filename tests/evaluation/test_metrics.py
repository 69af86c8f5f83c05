"""Exact match and ROUGE-L: by hand, against a plain definition, and within their range."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddlemix.evaluation.metrics import exact_match, rouge_l


@pytest.mark.parametrize(
    ("answer", "reference", "wanted"),
    [
        ("It is red.", "it is  RED", 1.0),
        ("红色。", "红色", 1.0),
        ("", "", 1.0),
        ("It is red", "It is not red", 0.0),
        ("12", "1 2", 0.0),
    ],
)
def test_exact_match(answer: str, reference: str, wanted: float) -> None:
    assert exact_match(answer, reference) == wanted


@pytest.mark.parametrize(
    ("answer", "reference", "wanted"),
    [
        ("police kill the gunman", "police killed the gunman", 3 / 4),  # Lin 2004, section 3.1
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("A cat, on the mat!", "a cat on the mat", 1.0),
        ("红色的车", "红色公交车", 2 * 3 / (4 + 5)),
        ("red 公交车", "Red公交", 2 * 3 / (4 + 3)),
        ("", "a", 0.0),
        ("a", "", 0.0),
        ("?", "?", 1.0),
        ("?", "!", 1.0),  # punctuation alone does not count
    ],
)
def test_rouge_l(answer: str, reference: str, wanted: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(wanted)


WORDS = st.lists(st.sampled_from("abc"), max_size=7)


def longest_common(first: list[str], second: list[str]) -> int:
    """By definition, slowly."""
    if not first or not second:
        return 0
    if first[-1] == second[-1]:
        return longest_common(first[:-1], second[:-1]) + 1
    return max(longest_common(first[:-1], second), longest_common(first, second[:-1]))


@given(WORDS, WORDS)
def test_rouge_l_equals_its_definition(first: list[str], second: list[str]) -> None:
    value = rouge_l(" ".join(first), " ".join(second))
    assert 0 <= value <= 1 and value == rouge_l(" ".join(second), " ".join(first))
    if first and second:
        common = longest_common(first, second)
        precision, recall = common / len(first), common / len(second)
        wanted = 2 * precision * recall / (precision + recall) if common else 0.0
        assert value == pytest.approx(wanted)
