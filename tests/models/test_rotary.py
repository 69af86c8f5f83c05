"""Scaled rotary positions: what the formulas give, and what no formula is for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from paddlemix.errors import UserError
from paddlemix.models.rotary import Rope, check_rope_scaling

LLAMA_31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def slowdown(scaling: dict[str, Any] | None, head_size: int = 8, theta: float = 1e4) -> np.ndarray | None:
    return Rope(head_size=head_size, theta=theta, scaling=scaling).slowdown()


def test_what_is_not_scaled_has_no_slowdown() -> None:
    assert slowdown(None) is None
    assert slowdown({"rope_type": "dynamic", "factor": 2.0}) is None  # depends on the length


def test_linear_divides_every_frequency() -> None:
    np.testing.assert_array_equal(slowdown({"rope_type": "linear", "factor": 4.0}), np.full(4, 0.25, "float32"))


def test_llama_31_keeps_what_turns_often_and_slows_what_does_not() -> None:
    """Llama 3.1 8B: heads of 128, base 500,000.  Pair i turns 8192 / (2 pi) * 500000^(-i/64) times in the old context:
    pair 28 4.19 times, pair 29 3.41 times, pair 35 0.997 times."""
    found = slowdown(LLAMA_31, head_size=128, theta=5e5)
    assert found is not None
    np.testing.assert_array_equal(found[:29], 1.0)
    np.testing.assert_array_equal(found[35:], 0.125)
    turns = [8192 / (2 * math.pi) * 5e5 ** (-i / 64) for i in range(29, 35)]
    np.testing.assert_allclose(found[29:35], [(t - 1) / 3 + (4 - t) / 3 / 8 for t in turns], rtol=1e-6)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "is not supported; allowed: null, or one of type linear, dynamic"),
        ({"factor": 2.0}, "is not supported"),
        ({"rope_type": ["linear"], "factor": 2.0}, "is not supported; allowed: null, or one of type linear, dynamic"),
        ({"rope_type": "linear"}, "does not fit; type 'linear' has factor"),
        ({"rope_type": "dynamic", "factor": 2.0, "alpha": 1.0}, "does not fit; type 'dynamic' has factor"),
        ({"rope_type": "linear", "factor": 0.5}, "factor 0.5 is below 1"),
        ({"rope_type": "linear", "factor": "2"}, "factor '2' is not a number above 0"),
        ({"rope_type": "linear", "factor": True}, "factor True is not a number above 0"),
        ({"rope_type": "linear", "factor": math.nan}, "factor nan is not a number above 0"),
        ({**LLAMA_31, "low_freq_factor": 4.0}, "low_freq_factor 4.0 must be below its high_freq_factor 4.0"),
        ({**LLAMA_31, "original_max_position_embeddings": 0}, "original_max_position_embeddings 0 is not a number"),
    ],
)
def test_what_cannot_be_computed_is_refused(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_rope_scaling(scaling, head_size=8)


def test_dynamic_needs_more_than_one_pair() -> None:
    with pytest.raises(UserError, match="needs heads wider than 2, these have 2"):
        check_rope_scaling({"rope_type": "dynamic", "factor": 2.0}, head_size=2)
