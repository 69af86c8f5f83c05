"""How long samples are, and how much of a run's batches would be padding: numbers known before any training.

Knows lengths only; no file, no text and no model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paddlemix.datasets.order import EpochBatchSampler, Grouping
from paddlemix.datasets.packing import pack_rows
from paddlemix.errors import UserError

_SEED = 0


@dataclass(frozen=True, kw_only=True)
class DataStatistics:
    """What `describe_lengths` finds.

    Args:
        samples: with at least one token.
        total: samples of the whole data set; more than `samples` where those were drawn from it.
        tokens: of all samples, visual ones included.
        minimum, median, p95, maximum: of the samples' lengths, tokens.
        image_share: visual tokens of all tokens, 0..1.
        padding_share: positions of the batches that hold no token, 0..1.
        batching: how the batches are made, in words.
    """

    samples: int
    total: int
    tokens: int
    minimum: int
    median: int
    p95: int
    maximum: int
    image_share: float
    padding_share: float
    batching: str

    @property
    def mean(self) -> float:
        """Tokens of a sample on average."""
        return self.tokens / self.samples

    def __str__(self) -> str:
        drawn = f" (estimated from {self.samples:,} samples)" if self.samples < self.total else ""
        return (
            f"{self.total:,} samples of {self.mean:,.0f} tokens on average, median {self.median:,}, longest "
            f"{self.maximum:,}; {self.image_share:.1%} image tokens; {self.padding_share:.1%} padding in "
            f"{self.batching}{drawn}"
        )


def describe_lengths(
    lengths: np.ndarray,
    batch_size: int,
    capacity: int | None = None,
    grouping: Grouping = "none",
    total: int | None = None,
) -> DataStatistics:
    """Sums up the lengths of samples and makes batches of them as a run would, to count their padding.

    Args:
        lengths: int [n, 2], tokens and how many of them are visual; 0 tokens for a sample that is left out.
        batch_size: rows of a batch, >= 1.
        capacity: tokens of a packed row; None where a row holds one sample.
        grouping: which samples meet in a batch; packed rows are mixed freely in any case.
        total: samples of the whole data set where `lengths` is of a part drawn from it.

    Raises:
        UserError: no sample has a token, or `batch_size` is below 1.
    """
    kept = np.asarray(lengths, dtype=np.int64).reshape(-1, 2)
    kept = kept[kept[:, 0] > 0]
    if not len(kept):
        raise UserError("no sample is left: every one of them is skipped or the data is empty")
    if batch_size < 1:
        raise UserError(f"batch size {batch_size}: at least 1 sample per batch")
    tokens = kept[:, 0]
    # "inverted_cdf" picks lengths that occur, so that "longest" is a sample and not an interpolation
    minimum, median, p95, maximum = np.percentile(tokens, (0, 50, 95, 100), method="inverted_cdf")
    return DataStatistics(
        samples=len(kept),
        total=len(kept) if total is None else total,
        tokens=int(tokens.sum()),
        minimum=int(minimum),
        median=int(median),
        p95=int(p95),
        maximum=int(maximum),
        image_share=float(kept[:, 1].sum() / tokens.sum()),
        padding_share=padding_share(kept, batch_size, capacity, grouping),
        batching=_in_words(batch_size, capacity, grouping),
    )


def padding_share(
    lengths: np.ndarray, batch_size: int, capacity: int | None = None, grouping: Grouping = "none"
) -> float:
    """Share of a run's positions that are padding, 0..1; arguments as for `describe_lengths`, every length above 0."""
    batches = batch_rows(lengths, batch_size, capacity, grouping)
    return 1 - float(batches.sum() / count_positions(batches))


def count_positions(batches: np.ndarray) -> int:
    """Positions of batches [batches, rows], each padded to its longest row."""
    return int(batches.max(axis=1).sum()) * batches.shape[1]


def batch_rows(
    lengths: np.ndarray, batch_size: int, capacity: int | None = None, grouping: Grouping = "none"
) -> np.ndarray:
    """Tokens of each row of the batches of one epoch.

    Args:
        lengths: int [n, 2] as for `describe_lengths`, every length above 0.

    Returns:
        int64 [batches, batch_size]; the last batch is filled from the epoch's beginning, as in a run.
    """
    tokens = lengths[:, 0].astype(np.int64)
    if capacity is not None:
        # a packed row holds samples of all lengths: grouping them would change nothing but their order
        tokens = np.array([tokens[pack].sum() for pack in pack_rows(tokens, capacity, _SEED)], dtype=np.int64)
        grouping = "none"
    # a run groups modalities by words rather than tokens; the order is of the same kind
    keys = np.where(lengths[:, 1] > 0, 1, -1) * lengths[:, 0] if grouping == "modality" else tokens
    # the run's own sampler, so that what is reported cannot differ from what is trained
    sampler = EpochBatchSampler(len(tokens), batch_size, seed=_SEED, grouping=grouping, lengths=keys)
    return tokens[sampler.order()].reshape(-1, batch_size)


def _in_words(batch_size: int, capacity: int | None, grouping: Grouping) -> str:
    rows = f"batches of {batch_size}"
    if capacity is not None:
        return f"{rows} rows, packed to {capacity:,} tokens"
    return rows if grouping == "none" else f"{rows}, grouped by {grouping}"
