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
    """Ours err by at most half as much again as torch's float32, in the mean, and nowhere by more than 1e-4 or that.

    What is meant is `assert_largest_as_exact`.  Of the largest error alone it does not hold for every configuration and
    instruction set, by chance and in both directions: of 478 comparisons two are outside (drawn models 10 and 13, 3.0
    and 1.7 times torch's, at 1.5e-5 and 1.0e-5), and seven where all libraries are limited to AVX2.  The root of the
    mean square is a number of all logits, and holds in each with a tenth of that addend.
    """
    (ours_mean, ours_most), (their_mean, their_most) = errors(found, exact), errors(theirs, exact)
    assert ours_mean <= 1.5 * their_mean + 1e-7
    assert ours_most <= max(1e-4, 1.5 * their_most)


def assert_largest_as_exact(found: list[np.ndarray], theirs: list[np.ndarray], exact: list[np.ndarray]) -> None:
    """The largest error of ours is at most 1.5 of that of torch's float32, plus 1e-6: the bound as it is meant.

    For models whose logits are small enough for its addend, and for the same arithmetic on other files.
    """
    assert_as_exact(found, theirs, exact)
    assert errors(found, exact)[1] <= 1.5 * errors(theirs, exact)[1] + 1e-6
