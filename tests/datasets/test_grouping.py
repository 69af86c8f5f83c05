"""Grouping by modality: the rules of LLaVA's own sampler."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from paddlemix.datasets.grouping import group_by_modality, modality_lengths
from paddlemix.datasets.mixture import EpochBatchSampler
from tests.tiny import make_sample


def test_lengths_count_words_and_tell_the_modality() -> None:
    samples = [make_sample("<image>\nWhat is it?", "A red bus."), make_sample("Hello there", "Hi")]
    assert modality_lengths(samples).tolist() == [7, -3]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 60).flatmap(lambda n: st.sampled_from((n, -n))), min_size=1, max_size=90))
def test_full_steps_hold_one_modality_and_nothing_is_lost(lengths: list[int]) -> None:
    values = np.array(lengths)
    order = group_by_modality(values, batch_size=3, batches=4, random=np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(len(values)))
    full = sum((values > 0).sum() // 12 if sign else (values < 0).sum() // 12 for sign in (True, False))
    for step in order[: full * 12].reshape(-1, 12):
        assert len(set(np.sign(values[step]))) == 1


def test_batches_of_a_step_are_of_like_total_length() -> None:
    values = np.arange(1, 13)
    order = group_by_modality(values, batch_size=3, batches=4, random=np.random.default_rng(0))
    totals = [values[batch].sum() for batch in order.reshape(4, 3)]
    assert max(totals) - min(totals) <= 3  # dealt longest first; in file order they would differ by 27


def test_ranks_share_an_epoch() -> None:
    lengths = np.array([5, -2, 7, 3, -9, 4, 6, -1] * 4)
    seen = []
    for rank in (0, 1):
        sampler = EpochBatchSampler(len(lengths), 2, accumulation=2, rank=rank, world_size=2, lengths=lengths)
        seen += [index for batch in sampler for index in batch]
    assert sorted(seen) == list(range(len(lengths)))
