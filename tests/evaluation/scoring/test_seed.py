"""SEED-Bench: the letter and nothing else, by type, images and videos."""

from __future__ import annotations

from paddlemix.evaluation.scoring.answered import LMMS_EVAL
from paddlemix.evaluation.scoring.seed import score_seed, seed_key
from tests.evaluation.scoring.asked import ask

RECORDS = [
    {"answer": "A", "data_type": "image", "category": "Scene"},
    {"answer": "B", "data_type": "image", "category": "Scene"},
    {"answer": "C", "data_type": "video", "category": "Action"},
    {"answer": "D", "data_type": "video", "category": "Action"},
]


def test_llava() -> None:
    score = score_seed(ask(["A", "B.", "c", None], RECORDS))
    assert score.metrics == {"accuracy": 25.0, "image_accuracy": 50.0, "video_accuracy": 0.0}
    assert score.by_category == {"Scene": {"accuracy": 50.0}, "Action": {"accuracy": 0.0}}
    assert "video_accuracy" not in score_seed(ask(["A"], RECORDS[:1])).metrics


def test_lmms_eval_takes_the_first_character() -> None:
    score = score_seed(ask(["Absolutely", "b. no", " C", ""], RECORDS), LMMS_EVAL)
    assert score.metrics == {"accuracy": 0.75, "image_accuracy": 1.0, "video_accuracy": 0.5}


def test_ids_are_ints_where_they_can_be() -> None:
    assert [seed_key(one) for one in ("101", 7, "v1_2")] == [101, 7, "v1_2"]
