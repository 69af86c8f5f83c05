"""What a run learned, to compare runs in different layouts: loss and gradient norm of every step, all weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.tiny_world import reports, weights


@dataclass(frozen=True)
class Learned:
    """The result of a training.

    Args:
        losses, norms: step -> value.
        weights: of the published model, the base of an adapter included.
    """

    losses: dict[int, float]
    norms: dict[int, float]
    weights: dict[str, np.ndarray]


def losses_and_weights(output_dir: Path) -> Learned:
    """Reads what a finished run with `logging_steps` 1 left in its `output_dir`."""
    return Learned(reports(output_dir), reports(output_dir, "grad_norm"), weights(output_dir))


@dataclass(frozen=True)
class Gaps:
    """Largest absolute differences of two runs."""

    loss: float
    norm: float
    weight: float


def gaps(one: Learned, other: Learned) -> Gaps:
    """How far two runs are apart; their steps, norms and weights must have the same keys."""
    assert one.losses.keys() == other.losses.keys() and one.losses
    assert one.norms.keys() == other.norms.keys() == one.losses.keys()
    assert one.weights.keys() == other.weights.keys()
    return Gaps(
        max(abs(value - other.losses[step]) for step, value in one.losses.items()),
        max(abs(value - other.norms[step]) for step, value in one.norms.items()),
        max(float(np.abs(value - other.weights[name]).max()) for name, value in one.weights.items()),
    )
