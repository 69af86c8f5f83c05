"""Several samples in one row, so that a row is nearly full of tokens instead of padding.

Which samples share a row is decided once, from their lengths alone; what keeps them apart in the model is the collated
batch's `segment_ids` and `position_ids`.  Knows no file and no image.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from paddlemix.datasets.batches import RowDataset
from paddlemix.errors import UserError
from paddlemix.sample import Example, Row, Skip

_WINDOW = 4096  # samples packed together: more fill rows no better, and a window's rows stay a mixture


def pack_rows(lengths: np.ndarray, capacity: int, seed: int) -> list[np.ndarray]:
    """Deals samples into rows of at most `capacity` tokens: shuffled, then best fit, longest first, in windows.

    Args:
        lengths: int [n], tokens of each sample; 0 for one that is left out.
        capacity: most tokens of a row, >= 1.
        seed: of the shuffle.

    Returns:
        int64 indices of each row, ascending; every sample of 1 token or more is in exactly one row.

    Raises:
        UserError: `capacity` is below 1, or a sample alone is longer than it.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if capacity < 1:
        raise UserError(f"a packed row needs room for 1 token or more, not {capacity}; set max_length higher")
    if lengths.max(initial=0) > capacity:
        raise UserError(
            f"sample {int(lengths.argmax())} has {lengths.max()} tokens, a packed row holds {capacity}; "
            "raise max_length, or let on_too_long shorten or skip such samples"
        )
    # Shuffled before it is cut into windows: which samples can share a row must not follow the order of the file.
    order = np.random.default_rng(seed).permutation(np.flatnonzero(lengths > 0))
    rows: list[np.ndarray] = []
    for start in range(0, len(order), _WINDOW):
        rows += _best_fit(order[start : start + _WINDOW], lengths, capacity)
    return rows


def _best_fit(window: np.ndarray, lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Each sample, longest first, goes to the fullest row that has room for it, else to a new one."""
    # best fit decreasing: long samples first, short ones fill the gaps; bisection keeps it at n log n
    window = window[np.argsort(-lengths[window], kind="stable")]
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (tokens that still fit, row), ascending
    for index, length in zip(window.tolist(), lengths[window].tolist(), strict=True):
        # the first row with room for it is the fullest one, because rows are sorted by what still fits
        place = bisect_left(open_rows, (length, 0))
        if place < len(open_rows):
            room, row = open_rows.pop(place)
            rows[row].append(index)
        else:
            room, row = capacity, len(rows)
            rows.append([index])
        room -= length
        if room:
            left = (room, row)
            open_rows.insert(bisect_left(open_rows, left), left)
    return [np.sort(np.array(row, dtype=np.int64)) for row in rows]


class PackedDataset:
    """A data set whose rows hold several samples of another.

    Args:
        dataset: returns each sample as a row of its own.
        packs: indices of the samples of each row, see `pack_rows`.
    """

    def __init__(self, dataset: RowDataset, packs: Sequence[np.ndarray]) -> None:
        self.dataset = dataset
        # two arrays instead of a list, because worker processes get a copy
        # the rows one after the other, and where each ends
        self._members = np.concatenate(packs) if len(packs) else np.zeros(0, dtype=np.int64)
        self._ends = np.cumsum([len(pack) for pack in packs], dtype=np.int64)

    def __len__(self) -> int:
        """Rows."""
        return len(self._ends)

    def members(self, row: int) -> list[int]:
        """Indices of the samples of a row, in their order there."""
        start = self._ends[row - 1] if row else 0
        return [int(index) for index in self._members[start : self._ends[row]]]

    def __getitem__(self, row: int) -> Row:
        """Encodes the samples of a row.

        Raises:
            UserError: what encoding a sample raised.
        """
        examples: list[Example] = []
        skipped: list[Skip] = []
        for index in self.members(row):
            found = self.dataset[index]
            examples += found.examples
            skipped += found.skipped
        return Row(tuple(examples), tuple(skipped))
