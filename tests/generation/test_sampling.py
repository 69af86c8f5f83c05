"""From scores to tokens: each filter by hand, and the same draws from the same seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from paddlemix.errors import UserError
from paddlemix.generation.sampling import GenerationSettings, Sampler

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.3, 0.15])
SCORES = np.log(PROBABILITIES).astype(np.float32)[None]


def draws(count: int = 4000, **values: Any) -> np.ndarray:
    """Share of each token among many draws."""
    sampler = Sampler(GenerationSettings(**{"temperature": 1.0, **values}))
    tokens = np.concatenate([sampler.next_tokens(SCORES) for _ in range(count)])
    assert tokens.dtype == np.int64
    return np.bincount(tokens, minlength=5) / count


def test_temperature_0_takes_the_likeliest() -> None:
    sampler = Sampler(GenerationSettings())
    scores = np.array([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]], dtype=np.float32)
    assert sampler.next_tokens(scores).tolist() == [1, 0]


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
    def sequence(seed: int) -> list[int]:
        sampler = Sampler(GenerationSettings(temperature=1.0, seed=seed))
        return [int(sampler.next_tokens(SCORES)[0]) for _ in range(50)]

    assert sequence(1) == sequence(1) != sequence(2)


def test_large_scores_and_small_temperatures_are_finite() -> None:
    scores = np.array([[1e4, 1e4 - 1, -1e4]], dtype=np.float32)
    sampler = Sampler(GenerationSettings(temperature=1e-3))
    assert sampler.next_tokens(scores).tolist() == [0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0 must be at least 1"),
        ({"temperature": -0.1}, "temperature -0.1 must be at least 0"),
        ({"top_k": -1}, "top_k -1 must be at least 0"),
        ({"top_p": 0.0}, "top_p 0.0 must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p 1.5 must be above 0"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GenerationSettings(**values)
