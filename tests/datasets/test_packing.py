"""Packing: nothing lost, nothing over the capacity, rows nearly full, the same again for the same seed."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddlemix.datasets.packing import PackedDataset, pack_rows
from paddlemix.errors import UserError
from tests.rows import NumberedRows, mixed_lengths


@given(lengths=st.lists(st.integers(0, 20), max_size=80), spare=st.integers(0, 30), seed=st.integers(0, 99))
def test_every_sample_stands_in_one_row_that_has_room_for_it(lengths: list[int], spare: int, seed: int) -> None:
    capacity = max([1, *lengths]) + spare
    values = np.array(lengths, dtype=np.int32)
    rows = pack_rows(values, capacity, seed)
    assert sorted(index for row in rows for index in row) == np.flatnonzero(values).tolist()
    for row in rows:
        assert 0 < values[row].sum() <= capacity
        assert (np.diff(row) > 0).all()


def test_the_seed_decides() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 500)
    first, again, other = (pack_rows(lengths, 100, seed) for seed in (1, 1, 2))
    assert [row.tolist() for row in first] == [row.tolist() for row in again]
    assert [row.tolist() for row in first] != [row.tolist() for row in other]


def test_rows_are_nearly_full() -> None:
    lengths = np.random.default_rng(0).integers(10, 400, 20_000)
    rows = pack_rows(lengths, 2048, 0)
    assert len(rows) * 2048 <= 1.01 * lengths.sum()


def test_a_hundred_thousand_samples_take_a_moment() -> None:
    """A million take seconds: the time grows with the number, not with its square."""
    lengths = np.random.default_rng(0).integers(10, 2000, 100_000)
    start = time.process_time()
    pack_rows(lengths, 2048, 0)
    assert time.process_time() - start < 5


def test_a_sample_that_fits_nowhere_is_named() -> None:
    with pytest.raises(UserError, match=r"sample 1 has 9 tokens, a packed row holds 8; raise max_length"):
        pack_rows(np.array([3, 9]), 8, 0)
    with pytest.raises(UserError, match="not 0"):
        pack_rows(np.array([0]), 0, 0)


def test_nothing_to_pack() -> None:
    assert pack_rows(np.array([0, 0]), 8, 0) == []
    assert len(PackedDataset(NumberedRows(np.array([0])), [])) == 0


def test_packed_rows_hold_their_samples_in_order() -> None:
    dataset = NumberedRows(mixed_lengths(60, skipped=5))
    packs = pack_rows(dataset.lengths, 24, 3)
    packed = PackedDataset(dataset, packs)
    assert len(packed) == len(packs)
    for number, pack in enumerate(packs):
        assert packed.members(number) == pack.tolist()
        assert [example.source for example in packed[number].examples] == [str(index) for index in pack]
        assert not packed[number].skipped


def test_a_sample_that_is_skipped_after_all_is_named_in_its_row() -> None:
    row = PackedDataset(NumberedRows(np.array([4, 0, 5])), [np.array([0, 1, 2])])[0]
    assert [example.source for example in row.examples] == ["0", "2"]
    assert [skip.index for skip in row.skipped] == [1]
