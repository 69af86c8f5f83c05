"""Measuring: all samples, in processes or not, kept by the data set's fingerprint."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix import file_locks
from paddlemix.datasets import sample_lengths as module
from paddlemix.datasets.sample_lengths import measure_lengths
from paddlemix.errors import UserError
from tests.conftest import HANG
from tests.rows import NumberedRows, mixed_lengths


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PADDLEMIX_CACHE", str(tmp_path))
    return tmp_path / "lengths"


class Counted(NumberedRows):
    """Counts how often it was asked."""

    asked = 0

    def measure(self, index: int) -> tuple[int, int]:
        self.asked += 1
        return super().measure(index)


def counted(**changes: Any) -> Counted:
    return Counted(**{"lengths": mixed_lengths(700, skipped=9), **changes})


def test_every_sample_is_measured_once_and_for_all(cache: Path) -> None:
    dataset = counted()
    found = measure_lengths(dataset)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, np.stack([dataset.lengths, dataset.lengths // 2], axis=1))
    np.testing.assert_array_equal(measure_lengths(dataset), found)
    assert dataset.asked == 700
    assert len(list(cache.glob("*.npy"))) == 1


def test_another_fingerprint_is_measured_anew() -> None:
    measure_lengths(counted())
    changed = counted(lengths=mixed_lengths(700, seed=1), fingerprint="other")
    np.testing.assert_array_equal(measure_lengths(changed)[:, 0], changed.lengths)


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY\x01\x00"])
def test_a_damaged_cache_is_written_again(cache: Path, content: bytes) -> None:
    measure_lengths(counted())
    [file] = cache.glob("*.npy")
    good = file.read_bytes()
    file.write_bytes(content)
    dataset = counted()
    measure_lengths(dataset)
    assert dataset.asked == 700 and file.read_bytes() == good


def test_a_bad_sample_stops_and_nothing_is_kept(cache: Path) -> None:
    with pytest.raises(UserError, match="600 is bad"):
        measure_lengths(counted(bad=600))
    assert not list(cache.glob("*.npy"))


def test_an_empty_data_set() -> None:
    assert measure_lengths(counted(lengths=np.zeros(0, dtype=np.int64))).shape == (0, 2)


def test_processes_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ALONE", 600)
    dataset = counted(lengths=mixed_lengths(1300))
    found = measure_lengths(dataset, workers=2)
    assert dataset.asked == 0
    np.testing.assert_array_equal(found[:, 0], dataset.lengths)
    with pytest.raises(UserError, match="1200 is bad"):
        measure_lengths(counted(lengths=mixed_lengths(1300), bad=1200, fingerprint="bad"), workers=2)


class Slow(Counted):
    """Measures its first sample only when somebody else asks for the same lengths."""

    def measure(self, index: int) -> tuple[int, int]:
        if index == 0 and self.asked == 0:
            assert other_waits.wait(HANG)
            if self.bad == 0:
                raise UserError("0 is bad")
        return super().measure(index)


other_waits = threading.Event()


@pytest.mark.parametrize("fails", [False, True])
def test_several_wait_for_the_first_and_not_for_one_that_failed(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """Threads lock as processes do: each opens the file of the lock itself."""
    first, second = Slow(mixed_lengths(700, skipped=9), bad=0 if fails else -1), counted()
    begun = threading.Event()
    other_waits.clear()
    lock = file_locks.lock_file

    def locked(*arguments: Any, **named: Any) -> bool:
        if begun.is_set():  # the second call is that of the thread that has to wait
            other_waits.set()
            return lock(*arguments, **named)
        got = lock(*arguments, **named)
        begun.set()
        return got

    monkeypatch.setattr(file_locks, "lock_file", locked)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(measure_lengths, first)
        assert begun.wait(HANG)
        two = pool.submit(measure_lengths, second)
        found = two.result(HANG)
        assert isinstance(one.exception(HANG), UserError) == fails
    assert (first.asked, second.asked) == ((0, 700) if fails else (700, 0))
    np.testing.assert_array_equal(found[:, 0], second.lengths)
