"""Every projector type: its weights' names, and its numbers against plain ones."""

from __future__ import annotations

import math

import numpy as np
import paddle
import pytest

from paddlemix.errors import UserError
from paddlemix.models.llava import build_projector
from tests.tiny_models import draw, randomise, weights_of


def gelu(states: np.ndarray) -> np.ndarray:
    return states * 0.5 * (1 + np.vectorize(math.erf)(states / math.sqrt(2)))


# names as in original LLaVA: a linear projector is the layer itself, the others a sequence with GELU between
@pytest.mark.parametrize(
    ("kind", "layers"),
    [("linear", [""]), ("mlp1x_gelu", ["0."]), ("mlp2x_gelu", ["0.", "2."]), ("mlp3x_gelu", ["0.", "2.", "4."])],
)
def test_numbers_and_names(kind: str, layers: list[str]) -> None:
    projector = randomise(build_projector(kind, 5, 7))
    weights = weights_of(projector)
    assert sorted(weights) == sorted(f"{layer}{part}" for layer in layers for part in ("weight", "bias"))
    states = draw(2, 3, 5)
    wanted = states.astype("float64")
    for number, layer in enumerate(layers):
        wanted = (gelu(wanted) if number else wanted) @ weights[f"{layer}weight"] + weights[f"{layer}bias"]
    np.testing.assert_allclose(projector(paddle.to_tensor(states)).numpy(), wanted, atol=1e-5)


def test_identity_has_no_weights_and_changes_nothing() -> None:
    projector, states = build_projector("identity", 5, 5), draw(2, 3, 5)
    assert weights_of(projector) == {}
    np.testing.assert_array_equal(projector(paddle.to_tensor(states)).numpy(), states)


@pytest.mark.parametrize("kind", ["mlp0x_gelu", "mlp2x_relu", "resampler", ""])
def test_an_unknown_type_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match=f"mm_projector_type '{kind}' is not one of linear, mlpNx_gelu"):
        build_projector(kind, 5, 7)
