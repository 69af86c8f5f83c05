"""Grouping: the rules of LLaVA's own sampler, and batches of like length."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddlemix.datasets.order import EpochBatchSampler, Grouping, count_words, group_by_length, group_by_modality
from tests.tiny import make_sample

Order = Callable[[np.ndarray, int, int, np.random.Generator], np.ndarray]


def padded(lengths: np.ndarray, order: np.ndarray, batch_size: int) -> int:
    """Positions of whole batches, each padded to its longest sample."""
    batches = lengths[order][: len(order) // batch_size * batch_size].reshape(-1, batch_size)
    return int(batches.max(axis=1).sum()) * batch_size


def test_words_are_counted_and_tell_the_modality() -> None:
    assert count_words(make_sample("<image>\nWhat is it?", "A red bus.")) == 7
    assert count_words(make_sample("Hello there", "Hi")) == -3


@pytest.mark.parametrize("order", [group_by_modality, group_by_length])
@settings(max_examples=50)
@given(lengths=st.lists(st.integers(-60, 60), min_size=1, max_size=90), seed=st.integers(0, 9))
def test_nothing_is_lost_and_the_seed_decides(order: Order, lengths: list[int], seed: int) -> None:
    first, again = (order(np.array(lengths), 3, 4, np.random.default_rng(seed)) for _ in range(2))
    assert sorted(first.tolist()) == list(range(len(lengths)))
    np.testing.assert_array_equal(first, again)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 60).flatmap(lambda n: st.sampled_from((n, -n))), min_size=1, max_size=90))
def test_full_steps_hold_one_modality(lengths: list[int]) -> None:
    values = np.array(lengths)
    order = group_by_modality(values, batch_size=3, batches=4, random=np.random.default_rng(0))
    full = sum((values > 0).sum() // 12 if sign else (values < 0).sum() // 12 for sign in (True, False))
    for step in order[: full * 12].reshape(-1, 12):
        assert len(set(np.sign(values[step]))) == 1


def test_batches_of_a_step_are_of_like_total_length() -> None:
    values = np.arange(1, 13)
    order = group_by_modality(values, batch_size=3, batches=4, random=np.random.default_rng(0))
    totals = [values[batch].sum() for batch in order.reshape(4, 3)]
    assert max(totals) - min(totals) <= 3  # dealt longest first; in file order they would differ by 27


def test_grouping_by_length_leaves_little_padding() -> None:
    random = np.random.default_rng(0)
    lengths = np.minimum(random.lognormal(6, 1, 8000), 2048).astype(int) + 1
    order = group_by_length(lengths, 8, 4, np.random.default_rng(0))
    assert padded(lengths, order, 8) < 1.03 * lengths.sum()
    assert padded(lengths, random.permutation(8000), 8) > 2 * lengths.sum()


def test_batches_that_run_at_the_same_time_are_of_like_length() -> None:
    """Between the shortest and the longest sample of a step lies a fiftieth of the lengths, not all of them."""
    lengths = np.random.default_rng(0).permutation(1600) + 1
    steps = lengths[group_by_length(lengths, 8, 4, np.random.default_rng(0))].reshape(-1, 32)
    assert np.ptp(steps, axis=1).max() <= 32
    means = steps.mean(axis=1)
    assert 10 < (np.diff(means) > 0).sum() < 39  # steps come in no order of length


def test_skipped_samples_are_spread_over_the_batches() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 3200)
    lengths[:800] = 0
    batches = lengths[group_by_length(lengths, 8, 4, np.random.default_rng(0))].reshape(-1, 8)
    assert (batches.max(axis=1) > 0).all()


def test_epochs_bring_other_samples_together() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 400)
    random = np.random.default_rng(0)
    batches = [
        {tuple(sorted(batch)) for batch in group_by_length(lengths, 4, 1, random).reshape(-1, 4)} for _ in range(2)
    ]
    assert len(batches[0] & batches[1]) < 5


@pytest.mark.parametrize("grouping", ["modality", "length"])
def test_ranks_share_an_epoch(grouping: Grouping) -> None:
    lengths = np.array([5, -2, 7, 3, -9, 4, 6, -1] * 4)
    lengths = np.abs(lengths) if grouping == "length" else lengths
    seen = []
    for rank in (0, 1):
        sampler = EpochBatchSampler(
            len(lengths), 2, accumulation=2, rank=rank, world_size=2, grouping=grouping, lengths=lengths
        )
        seen += [index for batch in sampler for index in batch]
    assert sorted(seen) == list(range(len(lengths)))


@pytest.mark.parametrize("grouping", ["none", "modality", "length"])
def test_a_step_has_the_same_samples_for_any_number_of_ranks(grouping: Grouping) -> None:
    """Passes and ranks are interchangeable, in the last, filled step of an epoch too."""
    lengths = np.random.default_rng(2).integers(-40, 40, 53)
    wanted = None
    for batch, accumulation, world in ((1, 8, 1), (1, 1, 8), (2, 4, 1), (2, 1, 4), (2, 2, 2), (8, 1, 1)):
        ranks = [
            EpochBatchSampler(53, batch, accumulation, 4, rank, world, grouping=grouping, lengths=lengths)
            for rank in range(world)
        ]
        epochs: list[list[int]] = []
        for epoch in range(2):
            for sampler in ranks:
                sampler.epoch = epoch
            passes = [list(sampler) for sampler in ranks]
            for start in range(0, len(passes[0]), accumulation):
                rows = [row for own in passes for item in own[start : start + accumulation] for row in item]
                epochs.append(sorted(rows))
        wanted = wanted or epochs
        assert epochs == wanted, (batch, accumulation, world)
