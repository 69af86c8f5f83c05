"""From scores to tokens: each filter by hand, and the same draws from the same seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from paddlemix.errors import UserError
from paddlemix.generation.sampling import GenerationSettings, Sampler, penalised

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.3, 0.15])
SCORES = np.log(PROBABILITIES).astype(np.float32)


def draws(count: int = 4000, **values: Any) -> np.ndarray:
    """Share of each token among many draws."""
    sampler = Sampler(GenerationSettings(**{"temperature": 1.0, **values}))
    tokens = np.array([sampler.next_token(SCORES) for _ in range(count)])
    return np.bincount(tokens, minlength=5) / count


def test_temperature_0_takes_the_likeliest() -> None:
    sampler = Sampler(GenerationSettings())
    scores = np.array([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]], dtype=np.float32)
    assert [sampler.next_token(row) for row in scores] == [1, 0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, PROBABILITIES),
        ({"temperature": 2.0}, PROBABILITIES**0.5),
        ({"temperature": 0.5}, PROBABILITIES**2),
        ({"top_k": 2}, [0, 0.4, 0, 0.3, 0]),
        ({"top_k": 99}, PROBABILITIES),
        ({"top_p": 0.5}, [0, 0.4, 0, 0.3, 0]),  # 0.4 alone does not reach a half
        ({"top_p": 0.39}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.8}, [0, 0.4, 0, 0.3, 0.15]),
        ({"top_k": 3, "top_p": 0.8}, [0, 0.4, 0, 0.3, 0]),  # of the three that are left 0.47 and 0.35 are enough
        ({"temperature": 0.5, "top_p": 0.5}, [0, 1, 0, 0, 0]),  # the temperature acts first
        ({"top_k": 1}, [0, 1, 0, 0, 0]),
        ({"top_p": 1e-9}, [0, 1, 0, 0, 0]),
    ],
)
def test_draws_have_the_filtered_distribution(values: dict[str, Any], expected: Any) -> None:
    wanted = np.asarray(expected, dtype=float)
    np.testing.assert_allclose(draws(**values), wanted / wanted.sum(), atol=0.03)


def test_equal_seeds_draw_equal_tokens() -> None:
    def sequence(seed: int, number: int = 0) -> list[int]:
        sampler = Sampler(GenerationSettings(temperature=1.0, seed=seed), number=number)
        return [sampler.next_token(SCORES) for _ in range(50)]

    assert sequence(1) == sequence(1) != sequence(2)
    assert sequence(1, 1) == sequence(1, 1) != sequence(1)


@pytest.mark.parametrize("values", [{"top_p": 0.6}, {"top_p": 0.999}, {"top_k": 50, "top_p": 0.9}, {"top_k": 3000}])
def test_of_a_large_vocabulary_the_same_tokens_are_left_as_by_sorting_it_all(values: dict[str, Any]) -> None:
    row = np.random.default_rng(0).standard_normal(5000) * 3
    settings = GenerationSettings(temperature=1.0, **values)
    found = Sampler(settings)._candidates(row)
    order = np.argsort(-row, kind="stable")[: settings.top_k or None]
    weights = np.exp(row[order]) / np.exp(row[order]).sum()
    before = np.concatenate([[0], np.cumsum(weights)[:-1]])
    assert found is not None and found.tolist() == order[before < settings.top_p].tolist()


def test_the_penalty_makes_every_token_that_was_there_less_likely() -> None:
    scores = np.array([2.0, -1.0, 1.5, 0.5, 1.9], dtype=np.float32)
    assert penalised(scores, {0, 1, -200}, 2.0).tolist() == [1.0, -2.0, 1.5, 0.5, np.float32(1.9)]
    assert scores[0] == 2.0
    sampler = Sampler(GenerationSettings(repetition_penalty=2.0), prompt_ids=np.array([0, -200]))
    assert [sampler.next_token(scores) for _ in range(4)] == [4, 2, 0, 0]  # each of them counts once


def test_the_penalty_acts_before_the_temperature_and_the_filters() -> None:
    settings = GenerationSettings(temperature=0.7, top_k=1, repetition_penalty=3.0)
    assert Sampler(settings, prompt_ids=[1]).next_token(np.array([1.0, 2.0, 0.5], dtype=np.float32)) == 0


def test_large_scores_and_small_temperatures_are_finite() -> None:
    scores = np.array([1e4, 1e4 - 1, -1e4], dtype=np.float32)
    assert Sampler(GenerationSettings(temperature=1e-3)).next_token(scores) == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0 must be at least 1"),
        ({"temperature": -0.1}, "temperature -0.1 must be at least 0"),
        ({"top_k": -1}, "top_k -1 must be at least 0"),
        ({"top_p": 0.0}, "top_p 0.0 must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p 1.5 must be above 0"),
        ({"seed": -1}, "seed -1 must be at least 0"),
        ({"num_beams": 0}, "num_beams 0 must be at least 1"),
        ({"temperature": float("nan")}, "temperature nan must be at least 0"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty 0.0 must be above 0 \(1 changes nothing\)"),
        ({"num_beams": 3, "temperature": 0.2}, "num_beams 3 needs temperature 0, not 0.2: beam search draws nothing"),
        ({"early_stopping": "always"}, "early_stopping 'always' is not one of True, False, 'never'"),
        ({"stop": ("a", "")}, "must be a tuple of texts that are not empty"),
        ({"stop": "###"}, "must be a tuple of texts that are not empty"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GenerationSettings(**values)
