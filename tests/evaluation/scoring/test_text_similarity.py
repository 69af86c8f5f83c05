"""Texts against references: by the packages, and equal to the plain metrics that training shows."""

from __future__ import annotations

import random

import pytest

from paddlemix.errors import UserError
from paddlemix.evaluation import metrics
from paddlemix.evaluation.scoring import optional
from paddlemix.evaluation.scoring.custom import METRICS, score_custom
from paddlemix.evaluation.scoring.text_similarity import (
    anls,
    bleu,
    bleu_tokenizer,
    edit_distance,
    rouge_l,
    sentence_bleu,
)
from tests.evaluation.scoring.asked import ask


def test_edit_distance_and_anls() -> None:
    assert [edit_distance(*pair) for pair in (("kitten", "sitting"), ("", "ab"), ("ab", ""), ("a", "a"))] == [
        3,
        2,
        2,
        0,
    ]
    assert anls(" Kitten", ["sitting", "kittens"]) == pytest.approx(6 / 7)
    assert anls("abcd", ["abxy"]) == 0.5 and anls("abcd", ["axyz"]) == 0.0
    assert anls("", [" "]) == 1.0 and anls("a", []) == 0.0


@pytest.mark.parametrize(
    "answer, references", [("A cat, on the mat!", ["a dog", "the cat on a mat"]), ("红色的车", ["红色公交车"])]
)
def test_rouge_l_of_the_package_is_the_plain_one(answer: str, references: list[str]) -> None:
    assert rouge_l(answer, references) == pytest.approx(max(metrics.rouge_l(answer, one) for one in references))


def test_rouge_l_on_drawn_texts() -> None:
    rng = random.Random(3)
    words = ("the", "cat", "红", "色", "sat", "on", ",", "a", "mat", "!", "Ünïcode", "12", "?")
    for _ in range(300):
        first, second = (" ".join(rng.choice(words) for _ in range(rng.randint(0, 8))) for _ in range(2))
        assert rouge_l(first, [second]) == pytest.approx(metrics.rouge_l(first, second)), (first, second)


def test_bleu() -> None:
    assert bleu(["the cat sat on the mat"], [["the cat sat on the mat", "a cat"]]) == pytest.approx(1.0)
    assert bleu(["红色的公交车在路上"], [["红色的公交车在路上"]]) == pytest.approx(1.0)
    assert 0 < sentence_bleu("a cat sat here", ["a cat sat there"], "13a") < 1
    assert bleu_tokenizer([["red"], ["a", "红"]]) == "zh" and bleu_tokenizer([["red"]]) == "13a"
    # sets with different numbers of references
    assert bleu(["a b c d e", "x"], [["a b c d e"], ["y", "x"]]) == pytest.approx(1.0)


def test_every_metric_of_a_data_set() -> None:
    asked = ask(["the cat sat on the mat"] * 2, [{"reference": "the cat sat on the mat", "category": "a"}] * 2)
    score = score_custom(asked, [*METRICS, "bleu"])
    assert {name: value for name, value in score.metrics.items() if name != "iou_at_0.5"} == pytest.approx(
        {name: 1.0 for name in (*METRICS, "bleu") if name != "iou_at_0.5"}
    )
    assert score_custom(asked, ["bleu"]).right == pytest.approx([1.0, 1.0])


def test_a_missing_package_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(optional.importlib, "import_module", fail)
    with pytest.raises(UserError, match=r"bleu needs the package sacrebleu.*pip install 'paddlemix\[eval\]'"):
        bleu(["a"], [["a"]])
