"""Boxes: read from answers and compared."""

from __future__ import annotations

import pytest

from paddlemix.evaluation.scoring.answered import LMMS_EVAL
from paddlemix.evaluation.scoring.refcoco import (
    hundredths,
    iou,
    parse_bracketed,
    parse_hundredths,
    parse_numbers,
    score_refcoco,
)
from tests.evaluation.scoring.asked import ask


def test_reading() -> None:
    assert parse_hundredths("{<10><20><30><40>}") == [10, 20, 30, 40]
    assert parse_hundredths("[0.1, 0.2, 0.3, 0.4]") is None
    assert parse_bracketed("at [0.1, 0.2, 0.3, -4] or so") == [0.1, 0.2, 0.3, -4.0]
    assert parse_bracketed("at 0.1 0.2 0.3 0.4") == [0, 0, 0, 0]
    assert parse_numbers("x 0.1, .2; 3 -4 5") == [0.1, 0.2, 3.0, -4.0]
    assert parse_numbers("1 2 3") is None


def test_iou() -> None:
    assert iou([0, 0, 2, 2], [1, 0, 3, 2]) == pytest.approx(1 / 3)
    assert iou([0, 0, 1, 1], [0, 0, 1, 1], pixel=1) == 1.0
    assert iou([0, 0, 0, 0], [0, 0, 0, 0]) == 0.0 and iou([0, 0, 1, 1], [2, 2, 3, 3]) == 0.0
    assert hundredths([10, 20, 30, 40], 100, 200) == [10, 10, 40, 30]


def test_score() -> None:
    record = {"bbox": [10, 20, 30, 40], "width": 100, "height": 200, "category": "testA"}
    score = score_refcoco(ask(["{<10><10><40><30>}", "{<50><50><60><60>}", "no"], [record] * 3))
    assert score.metrics == {"accuracy": pytest.approx(1 / 3)} and score.by_category["testA"] == score.metrics


def test_lmms_eval() -> None:
    record = {"bbox": [10, 20, 30, 40], "width": 100, "height": 200}
    score = score_refcoco(ask(["[0.1, 0.1, 0.4, 0.2]", "no box"], [record] * 2), LMMS_EVAL)
    assert list(score.right) == [1.0, 0.0]  # an IoU of a half is enough
    assert score.metrics["accuracy_at_0.7"] == 0.0 and score.metrics["iou"] == pytest.approx(0.25)
    assert score.metrics["center_accuracy"] == 0.5
