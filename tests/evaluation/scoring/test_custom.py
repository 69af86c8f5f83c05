"""A data set of the user's: metrics by name, by category, and errors."""

from __future__ import annotations

import pytest

from paddlemix.errors import UserError
from paddlemix.evaluation.scoring.custom import box_accuracy, metric_names, score_custom
from tests.evaluation.scoring.asked import ask


def test_score() -> None:
    records = [
        {"reference": "Red car", "category": "a"},
        {"references": ["blue", "green"], "category": "b"},
        {"reference": "[0.1, 0.1, 0.5, 0.5]", "category": "b"},
    ]
    asked = ask(["red car.", "green", "0.1 0.1 0.5 0.45"], records)
    score = score_custom(asked, ["exact_match", "iou@0.5", "anls", "vqa_accuracy"])
    assert score.metrics["exact_match"] == pytest.approx(2 / 3) and list(score.right) == [1.0, 1.0, 0.0]
    assert score.metrics["iou_at_0.5"] == pytest.approx(1 / 3)
    assert score.by_category["b"]["exact_match"] == 0.5 and score.by_category["a"]["vqa_accuracy"] == 1.0


def test_errors() -> None:
    assert metric_names(["ROUGE-L", "iou", "rouge_l"]) == ("rouge_l", "iou_at_0.5")
    with pytest.raises(UserError, match=r"metric 'exact_mach' is not one of .*did you mean 'exact_match'"):
        metric_names(["exact_mach"])
    with pytest.raises(UserError, match="question 0 has no reference answer"):
        score_custom(ask(["x"], [{}]))
    assert box_accuracy("no", ["[0, 0, 1, 1]"]) == 0.0 and box_accuracy("0 0 1 1", ["none"]) == 0.0
