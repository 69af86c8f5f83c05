"""Examples -> Batch: padding, positions, the merge index and the supervised positions, all in numpy.

After this nothing needs arithmetic on positions: the model gathers.  Knows no file and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from paddlemix.sample import IGNORE_INDEX, IMAGE_TOKEN_INDEX, NEWLINE_INDEX, Batch, Example


def collate(examples: Sequence[Example], tokens_per_tile: int, padding: Literal["right", "left"] = "right") -> Batch:
    """Pads examples to the longest and resolves every position.

    Args:
        examples: at least one; text-only and image examples may be mixed.
        tokens_per_tile: feature rows the tower gives for one tile (P).
        padding: "right" for training, "left" for generating in a batch.

    Returns:
        One row per example.
    """
    length = max(len(example.input_ids) for example in examples)
    shape = (len(examples), length)
    input_ids, position_ids, segment_ids = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    is_image = np.zeros(shape, dtype=bool)
    for row, example in enumerate(examples):
        count = len(example.input_ids)
        span = slice(length - count, length) if padding == "left" else slice(0, count)
        is_image[row, span] = example.input_ids == IMAGE_TOKEN_INDEX
        input_ids[row, span] = np.where(is_image[row, span], 0, example.input_ids)
        labels[row, span] = example.labels
        position_ids[row, span] = np.arange(count)
        segment_ids[row, span] = 1
    loss_index, loss_targets = _supervised(labels, segment_ids)
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        segment_ids=segment_ids,
        pixel_values=_stack_tiles(examples),
        merge_index=_merge_index(examples, is_image, tokens_per_tile),
        loss_index=loss_index,
        loss_targets=loss_targets,
        sources=tuple(example.source for example in examples),
    )


def _supervised(labels: np.ndarray, segment_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat positions whose next token is trained, and those tokens.  A sample's first token has nothing before it."""
    length = labels.shape[1]
    rows, columns = np.nonzero((labels[:, 1:] != IGNORE_INDEX) & (segment_ids[:, 1:] == segment_ids[:, :-1]))
    return rows * length + columns, labels[rows, columns + 1]


def _stack_tiles(examples: Sequence[Example]) -> np.ndarray | None:
    tiles = [example.pixel_values for example in examples if len(example.pixel_values)]
    return np.concatenate(tiles) if tiles else None


def _merge_index(examples: Sequence[Example], is_image: np.ndarray, tokens_per_tile: int) -> np.ndarray | None:
    """Row of concat(token embeddings [B*L], tile features [N*P], newline [1]) for each position."""
    tile_counts = [len(example.pixel_values) for example in examples]
    if not sum(tile_counts):
        return None
    positions = is_image.size
    newline = positions + sum(tile_counts) * tokens_per_tile
    first_rows = positions + np.cumsum([0, *tile_counts[:-1]]) * tokens_per_tile
    sources = [
        np.where(example.image_index == NEWLINE_INDEX, newline, example.image_index + first)
        for example, first in zip(examples, first_rows, strict=True)
    ]
    index = np.arange(positions, dtype=np.int64)
    index[is_image.reshape(-1)] = np.concatenate(sources)
    return index
