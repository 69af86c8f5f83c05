"""HallusionBench: one of two words, right for a question, a figure, a question on all figures."""

from __future__ import annotations

import pytest

from paddlemix.evaluation.scoring.answered import LMMS_EVAL
from paddlemix.evaluation.scoring.hallusion_bench import parse_anywhere, parse_words, score_hallusion_bench
from tests.evaluation.scoring.asked import ask


@pytest.mark.parametrize(
    ("text", "words", "anywhere"),
    [
        ("Yes, it is.", "1", "1"),
        ("No.", "0", "0"),
        ("yes and no", "unknown", "1"),
        ("It has eyes", "unknown", "1"),
        ("maybe", "unknown", "0"),
    ],
)
def test_parsing(text: str, words: str, anywhere: str) -> None:
    assert (parse_words(text), parse_anywhere(text)) == (words, anywhere)


def test_score() -> None:
    records = [
        {"category": "VD", "subcategory": "chart", "set_id": "0", "figure_id": f, "question_id": q, "gt_answer": "1"}
        for f in "01"
        for q in "01"
    ]
    asked = ask(["Yes", "Yes", "Yes", "No"], records)
    wanted = {"a_acc": 75.0, "f_acc": 50.0, "q_acc": 50.0}
    score = score_hallusion_bench(asked)
    assert score.metrics == wanted and score.by_category == {"VD": wanted, "chart": wanted}
    assert score_hallusion_bench(asked, LMMS_EVAL).metrics == {"a_acc": 0.75, "f_acc": 0.5, "q_acc": 0.5}
