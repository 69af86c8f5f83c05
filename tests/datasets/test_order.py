"""Which rows a rank sees when: a function of seed, epoch and rank alone."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from paddlemix.datasets.order import EpochBatchSampler
from paddlemix.errors import UserError

SIZES = st.integers(1, 60)
COUNTS = st.integers(1, 4)


def epoch_of(sampler: EpochBatchSampler, epoch: int) -> list[list[int]]:
    sampler.epoch = epoch
    return list(sampler)


@given(size=SIZES, batch=COUNTS, accumulation=COUNTS, world=COUNTS, epoch=st.integers(0, 3), shuffle=st.booleans())
def test_ranks_share_an_epoch(size: int, batch: int, accumulation: int, world: int, epoch: int, shuffle: bool) -> None:
    samplers = [
        EpochBatchSampler(size, batch, accumulation, seed=5, rank=rank, world_size=world, shuffle=shuffle)
        for rank in range(world)
    ]
    ranks = [epoch_of(sampler, epoch) for sampler in samplers]
    per_step = batch * accumulation * world
    steps = -(-size // per_step)
    for sampler, batches in zip(samplers, ranks, strict=True):
        assert sampler.steps_per_epoch == steps
        assert len(batches) == len(sampler) == steps * accumulation
        assert {len(rows) for rows in batches} == {batch}  # the last step is full
    together = [index for micro in zip(*ranks, strict=True) for rows in micro for index in rows]
    np.testing.assert_array_equal(together, samplers[0].order())
    assert sorted(together[:size]) == list(range(size))  # each sample once
    assert together[size:] == (together[:size] * per_step)[: len(together) - size]  # then again from the beginning


def test_last_step_is_filled_even_from_a_small_set() -> None:
    sampler = EpochBatchSampler(2, 3, accumulation=2, shuffle=False)
    assert list(sampler) == [[0, 1, 0], [1, 0, 1]]


@given(size=st.integers(2, 60), seed=st.integers(0, 2**31), epoch=st.integers(0, 5))
def test_order_depends_on_seed_epoch_and_rank_alone(size: int, seed: int, epoch: int) -> None:
    first = EpochBatchSampler(size, 2, seed=seed, rank=1, world_size=2)
    for other in range(epoch):  # having gone through earlier epochs, partly or wholly, changes nothing
        next(iter(first))
        epoch_of(first, other)
    np.random.seed(epoch)
    expected = epoch_of(EpochBatchSampler(size, 2, seed=seed, rank=1, world_size=2), epoch)
    assert epoch_of(first, epoch) == expected == epoch_of(first, epoch)


@given(seed=st.integers(0, 1000), other=st.integers(0, 1000))
def test_other_seed_or_epoch_is_another_order(seed: int, other: int) -> None:
    assume(seed != other)
    orders = []
    for chosen, epoch in ((seed, 0), (seed, 1), (other, 0), (other, 1)):
        sampler = EpochBatchSampler(50, 1, seed=chosen)
        sampler.epoch = epoch
        orders.append(tuple(sampler.order()))
    assert len(set(orders)) == 4


def test_file_order() -> None:
    sampler = EpochBatchSampler(4, 1, rank=1, world_size=2, shuffle=False)
    assert epoch_of(sampler, 0) == epoch_of(sampler, 1) == [[1], [3]]


def test_no_sample() -> None:
    with pytest.raises(UserError, match="the data set is empty"):
        EpochBatchSampler(0, 1)


def test_sampler_goes_to_another_process() -> None:
    sampler = EpochBatchSampler(10, 2, seed=3)
    sampler.epoch = 2
    assert list(pickle.loads(pickle.dumps(sampler))) == list(sampler)
