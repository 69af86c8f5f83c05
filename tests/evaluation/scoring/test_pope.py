"""POPE: what counts as a no, and the numbers of a model that always says yes."""

from __future__ import annotations

import pytest

from paddlemix.errors import UserError
from paddlemix.evaluation.scoring.answered import LMMS_EVAL
from paddlemix.evaluation.scoring.pope import METRICS, parse_yes_no, score_pope
from tests.evaluation.scoring.asked import ask


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Yes", "yes"),
        ("No", "no"),
        ("No, there is.", "no"),
        ("It is not. Yes", "no"),
        ("Yes. No", "yes"),  # the first sentence alone
        ("Nothing", "yes"),
        ("NO", "yes"),  # only No and no
        ("", "yes"),
        ("Is it?\nno", "yes"),  # a line end does not separate words
        ("n,o", "no"),  # commas go first
    ],
)
def test_parse_yes_no(text: str, wanted: str) -> None:
    assert parse_yes_no(text) == wanted


def labels(count: int = 4) -> list[dict[str, str]]:
    return [
        {"label": "yes" if place % 2 else "no", "category": name}
        for name in ("random", "popular", "adversarial")
        for place in range(count)
    ]


def test_always_yes() -> None:
    score = score_pope(ask(["Yes"] * 12, labels()))
    wanted = {"accuracy": 0.5, "precision": 0.5, "recall": 1.0, "f1": 2 / 3, "yes_ratio": 1.0}
    assert score.metrics == pytest.approx(wanted) and tuple(score.metrics) == METRICS
    assert list(score.by_category) == ["random", "popular", "adversarial"]
    assert list(score.right) == [False, True] * 6


def test_an_oracle_and_a_model_that_always_says_no() -> None:
    records = labels()
    score = score_pope(ask([one["label"].title() for one in records], records))
    assert [score.metrics[name] for name in METRICS] == [1.0, 1.0, 1.0, 1.0, 0.5]
    score = score_pope(ask(["No"] * 12, records))  # the official scorer divides by zero here
    assert [score.metrics[name] for name in METRICS] == [0.5, 0.0, 0.0, 0.0, 0.0]


def test_the_mean_is_of_the_categories() -> None:
    records = [{"label": "yes", "category": "a"}] * 3 + [{"label": "yes", "category": "b"}]
    score = score_pope(ask(["Yes", "Yes", "Yes", "No"], records))
    assert score.metrics["accuracy"] == 0.5


def test_lmms_eval_does_not_parse() -> None:
    records = [{"label": "yes"}, {"label": "no"}, {"label": "yes"}, {"label": "no"}]
    score = score_pope(ask([" YES ", "No.", "maybe", "no"], records), LMMS_EVAL)
    assert list(score.right) == [True, False, False, True]
    # "maybe" is not a missed yes for recall, and the ratio is of the labels
    assert dict(score.metrics) == {"accuracy": 0.5, "precision": 1.0, "recall": 1.0, "f1": 1.0, "yes_ratio": 0.5}
    with pytest.raises(UserError, match="label 'maybe'"):
        score_pope(ask(["no"], [{"label": "maybe"}]), LMMS_EVAL)
