"""Logits held to the reference in float64 by how far its own float32 is from it: a bound for every processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the reference environment: make reference")


@contextmanager
def in_float64() -> Iterator[None]:
    """Where transformers asks for float32, in norms, softmax and rotary angles, it gets float64."""
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def errors(found: list[np.ndarray], exact: list[np.ndarray]) -> tuple[float, float]:
    """Root of the mean square of all differences, and the largest.

    The largest of some thousand is chance: two libraries whose errors are equally large differ in it by a factor of
    three, and by one of 1.4 in the mean.
    """
    differences = np.concatenate([(one - other).ravel() for one, other in zip(found, exact, strict=True)])
    return float(np.sqrt(np.mean(differences**2))), float(np.abs(differences).max())


def assert_as_exact(found: list[np.ndarray], theirs: list[np.ndarray], exact: list[np.ndarray]) -> None:
    """Ours err by at most half as much again as torch's float32, in the mean, and nowhere by more than 1e-4 or that."""
    (ours_mean, ours_most), (their_mean, their_most) = errors(found, exact), errors(theirs, exact)
    assert ours_mean <= 1.5 * their_mean + 1e-7
    assert ours_most <= max(1e-4, 1.5 * their_most)
