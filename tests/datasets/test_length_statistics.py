"""Padding and lengths against numbers that can be counted by hand, and the order of good and bad ways to batch."""

from __future__ import annotations

import numpy as np
import pytest

from paddlemix.datasets.length_statistics import batch_rows, count_positions, describe_lengths, padding_share
from paddlemix.errors import UserError


def lengths_of(*tokens: int, visual: int = 0) -> np.ndarray:
    return np.array([[count, visual] for count in tokens], dtype=np.int32)


@pytest.fixture(scope="module")
def mixture() -> np.ndarray:
    """Images of 576 tokens with lognormal text, and a tenth of text alone."""
    random = np.random.default_rng(0)
    has_image = random.random(3000) > 0.1
    text = np.clip(random.lognormal(5, 0.8, 3000), 20, 1400).astype(np.int64)
    return np.column_stack([text + 576 * has_image, 576 * has_image])


def test_lengths_are_summed_up() -> None:
    found = describe_lengths(np.array([[10, 4], [30, 4], [0, 0], [20, 0]]), batch_size=3)
    assert (found.samples, found.total, found.tokens, found.mean) == (3, 3, 60, 20)
    assert (found.minimum, found.median, found.p95, found.maximum) == (10, 20, 30, 30)
    assert found.image_share == pytest.approx(8 / 60)
    assert found.padding_share == pytest.approx(1 - 60 / 90)
    assert str(found) == (
        "3 samples of 20 tokens on average, median 20, longest 30; 13.3% image tokens; 33.3% padding in batches of 3"
    )


def test_an_estimate_says_so() -> None:
    found = describe_lengths(lengths_of(5, 5), batch_size=2, capacity=10, total=70_000)
    assert str(found).startswith("70,000 samples of 5 tokens on average")
    assert str(found).endswith("padding in batches of 2 rows, packed to 10 tokens (estimated from 2 samples)")


def test_every_batch_is_padded_to_its_longest_row() -> None:
    assert count_positions(np.array([[3, 5], [2, 2]])) == 2 * 5 + 2 * 2


@pytest.mark.parametrize("way", [{}, {"grouping": "length"}, {"grouping": "modality"}])
def test_batches_hold_every_sample(mixture: np.ndarray, way: dict[str, str]) -> None:
    rows = batch_rows(mixture, 8, **way)  # type: ignore[arg-type]
    assert rows.shape == (375, 8)
    np.testing.assert_array_equal(np.sort(rows.reshape(-1)), np.sort(mixture[:, 0]))


def test_packed_rows_hold_every_token(mixture: np.ndarray) -> None:
    rows = batch_rows(mixture, 1, capacity=2048)
    assert rows.sum() == mixture[:, 0].sum()
    assert rows.max() <= 2048


def test_grouping_and_packing_save_padding(mixture: np.ndarray) -> None:
    plain = padding_share(mixture, 8)
    assert plain > 0.25
    assert padding_share(mixture, 8, grouping="modality") < plain
    assert padding_share(mixture, 8, grouping="length") < 0.05
    assert padding_share(mixture, 8, capacity=2048) < 0.1


@pytest.mark.parametrize(
    ("lengths", "batch_size", "message"),
    [(np.zeros((0, 2)), 8, "no sample is left"), (lengths_of(0), 8, "no sample is left"), (lengths_of(3), 0, "size 0")],
)
def test_nothing_to_describe(lengths: np.ndarray, batch_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        describe_lengths(lengths, batch_size)
