"""Which records of a data file an entry uses: `path#N`, `split` and `weight`.

All of it is a function of the file and the seed, never of the epoch, so that a run can be resumed.
Source: the `#N` suffix as in ms-swift; slices as in Hugging Face datasets' split strings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paddlemix.config.structures import SLICE
from paddlemix.errors import UserError

_COUNTED = re.compile(r"(?P<path>.+)#(?P<count>\d+)")


def split_count(path: str) -> tuple[str, int | None]:
    """Takes the `#N` off a path.

    Args:
        path: "data/a.json" or "data/a.json#2000"; a file whose own name ends so keeps it.

    Returns:
        The path and N, or None without it.

    Raises:
        UserError: N is 0.
    """
    found = _COUNTED.fullmatch(path)
    # a file may be called "a#1.json" or "data#5": what exists is meant
    if found is None or Path(path).exists():
        return path, None
    count = int(found["count"])
    if count < 1:
        raise UserError(f"data_files '{path}': the number after # must be at least 1")
    return found["path"], count


def select_rows(size: int, entry: Mapping[str, Any], count: int | None, seed: int) -> np.ndarray:
    """Chooses among the records of a file.

    Args:
        size: records of the file.
        entry: item of `dataset["train"]`; its `split` ("[:90%]", "[90%:]", "[100:200]") cuts the file first, then
            `weight` (above 0: 0.5 chooses half of the records, 2.5 each twice and half of them once more).
        count: N of `path#N`: how many records, each once before any is repeated.
        seed: of the draw.

    Returns:
        int64 [n], ascending; a record that is chosen several times is listed several times.

    Raises:
        UserError: the split leaves nothing, or the entry has a weight although its file says `#N`.
    """
    rows = np.arange(*_bounds(entry.get("split"), size), dtype=np.int64)
    if not len(rows):
        raise UserError(f"split '{entry['split']}' leaves none of the {size} records of {entry['data_files']}")
    # `#N` and `weight` are the same draw: a weight is a number of records that depends on the file
    weight = entry.get("weight")
    if weight is not None:
        if count is not None:
            raise UserError(f"{entry['data_files']}: both #{count} and weight {weight:g} say how much; remove one")
        count = max(round(weight * len(rows)), 1)
    return rows if count is None else draw_rows(rows, count, seed)


def draw_rows(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` of `rows`, ascending: as many whole copies as fit, the rest drawn without repetition."""
    # The seed of the draw includes the number of rows: two files of one entry do not draw alike.
    copies, rest = divmod(count, len(rows))
    drawn = np.random.default_rng([seed, len(rows)]).choice(rows, rest, replace=False)
    return np.sort(np.concatenate([*[rows] * copies, drawn]))


def _bounds(split: str | None, size: int) -> tuple[int, int]:
    if split is None:
        return 0, size
    found = SLICE.fullmatch(split)
    if found is None:
        raise UserError(f"split '{split}' is not a slice; write [:90%], [90%:], [100:200] or the like")
    return _place(found["first"], size, 0), _place(found["last"], size, size)


def _place(bound: str | None, size: int, default: int) -> int:
    if bound is None:
        return default
    # rounded, not cut: [:90%] and [90%:] of one file share no record and leave none out
    return min(round(float(bound[:-1]) / 100 * size), size) if bound.endswith("%") else min(int(bound), size)
