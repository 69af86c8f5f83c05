"""What scorers share: questions, scores, means."""

from __future__ import annotations

import pytest

from paddlemix.errors import UserError
from paddlemix.evaluation.scoring.answered import Answered, check_answered, group, mean, means_by


def test_a_record_without_a_key_is_one_error() -> None:
    one = Answered(question_id="q7", text="yes", record={"answer": "yes"})
    assert one.value("answer") == "yes"
    with pytest.raises(UserError, match="question 'q7' has no 'label'"):
        one.value("label")


def test_nothing_and_unknown_protocols_are_not_scored() -> None:
    one = Answered(question_id=1, text="")
    check_answered([one], "lmms-eval")
    with pytest.raises(UserError, match="no question"):
        check_answered([])
    with pytest.raises(UserError, match="'lmms' is not one of llava, lmms-eval"):
        check_answered([one], "lmms")


def test_means_and_groups() -> None:
    assert group("aba") == {"a": [0, 2], "b": [1]}
    assert mean([]) == 0.0 and mean([1, 0]) == 0.5
    assert means_by(["x", "", "x"], [1.0, 1.0, 0.0], "accuracy", 100) == {"x": {"accuracy": 50.0}}
