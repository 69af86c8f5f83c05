"""GQA: exact answers, by type, and the distance between distributions."""

from __future__ import annotations

import pytest

from paddlemix.evaluation.scoring.answered import LMMS_EVAL
from paddlemix.evaluation.scoring.gqa import gqa_prediction, score_gqa
from tests.evaluation.scoring.asked import ask


def test_prediction() -> None:
    assert [gqa_prediction(text) for text in ("Red.", "a b...", ".x", "No. ")] == ["red", "a b", ".x", "no. "]


def test_score() -> None:
    types = [{"structural": "query", "semantic": "attr"}, {"structural": "verify", "semantic": "obj"}]
    groups = [{"global": "color"}, {"global": None}]
    records = [
        {"answer": "red", "types": types[0], "groups": groups[0]},
        {"answer": "red", "types": types[0], "groups": groups[0]},
        {"answer": "yes", "types": types[1], "groups": groups[1]},
    ]
    score = score_gqa(ask(["Red.", "blue", "Yes"], records))
    # of two "red" one is said: (1 - 2)^2 / 2, in hundredths
    wanted = {"accuracy": 200 / 3, "open": 50.0, "binary": 100.0, "distribution": 0.005}
    assert score.metrics == pytest.approx(wanted)
    assert score.by_category["structural/query"] == {"accuracy": 50.0}
    assert score.by_category["semantic/obj"] == {"accuracy": 100.0}


def test_without_types_only_the_accuracy() -> None:
    assert score_gqa(ask(["red car", None], [{"answer": "red car"}] * 2)).metrics == {"accuracy": 50.0}


def test_lmms_eval_ignores_punctuation() -> None:
    score = score_gqa(ask(["T-Shirt!", "t shirt"], [{"answer": "t-shirt"}] * 2), LMMS_EVAL)
    assert list(score.right) == [1, 0] and score.unit == "share"
