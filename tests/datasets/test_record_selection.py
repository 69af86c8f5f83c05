"""Which records of a file an entry takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddlemix.datasets.record_selection import select_rows, split_count
from paddlemix.errors import UserError


def choose(size: int, count: int | None = None, seed: int = 0, **entry: Any) -> list[int]:
    return select_rows(size, {"data_files": "a.json", **entry}, count, seed).tolist()


def test_split_count(tmp_path: Path) -> None:
    assert split_count("a.json") == ("a.json", None)
    assert split_count("a.json#20") == ("a.json", 20)
    assert split_count("a#b.json") == ("a#b.json", None)
    own = tmp_path / "a.json#3"
    own.write_text("[]")
    assert split_count(str(own)) == (str(own), None)  # the file itself is called that
    with pytest.raises(UserError, match="a.json#0.*at least 1"):
        split_count("a.json#0")


def test_everything_without_keys() -> None:
    assert choose(4) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("[:50%]", [0, 1, 2, 3, 4]),
        ("train[80%:]", [8, 9]),
        ("[2:4]", [2, 3]),
        ("[8:400]", [8, 9]),
        ("[:]", list(range(10))),
        ("[12.5%:25%]", [1]),
    ],
)
def test_split(split: str, rows: list[int]) -> None:
    assert choose(10, split=split) == rows


@given(st.integers(1, 500), st.integers(0, 100))
def test_a_split_and_its_rest_are_the_whole(size: int, percent: int) -> None:
    parts = []
    for split in (f"[:{percent}%]", f"[{percent}%:]"):
        try:
            parts += choose(size, split=split)
        except UserError:  # nothing is left on this side
            continue
    assert parts == list(range(size))


@given(st.integers(1, 60), st.integers(1, 200), st.integers(0, 3))
def test_a_count_takes_each_before_any_twice(size: int, count: int, seed: int) -> None:
    rows = choose(size, count, seed)
    assert rows == sorted(rows) and len(rows) == count
    times = np.bincount(rows, minlength=size)
    assert times.max() - times.min() <= 1
    assert rows == choose(size, count, seed)


def test_the_seed_draws() -> None:
    assert choose(1000, 10, seed=1) != choose(1000, 10, seed=2)


def test_weight() -> None:
    assert len(choose(10, weight=0.5)) == 5
    assert choose(3, weight=2) == [0, 0, 1, 1, 2, 2]
    assert len(choose(10, weight=0.0001)) == 1  # never nothing
    assert len(choose(10, weight=2.5, split="[:4]")) == 10


def test_errors() -> None:
    with pytest.raises(UserError, match=r"split '\[20:\]' leaves none of the 10 records of a.json"):
        choose(10, split="[20:]")
    with pytest.raises(UserError, match=r"split 'train' is not a slice"):
        choose(10, split="train")
    with pytest.raises(UserError, match=r"#3 and weight 2"):
        choose(10, 3, weight=2)
