"""Rows -> Batch: padding, positions, segments, the merge index and the supervised positions, all in numpy.

After this nothing needs arithmetic on positions: the model gathers.  Knows no file and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from paddlemix.sample import IGNORE_INDEX, IMAGE_TOKEN_INDEX, NEWLINE_INDEX, Batch, Example, Row


def collate(
    rows: Sequence[Row | Example],
    tokens_per_tile: int,
    padding: Literal["right", "left"] = "right",
    pad_to_multiple_of: int = 1,
    pad_tiles_to_multiple_of: int = 1,
) -> Batch:
    """Pads rows to the longest and resolves every position.

    Args:
        rows: at least one; an example is a row of its own; text-only and image examples may be mixed.  A row whose
            samples were all skipped becomes one position that nothing is learned from.
        tokens_per_tile: feature rows that the tower computes for one tile (P).
        padding: "right" for training, "left" for generating in a batch.
        pad_to_multiple_of: positions of a row are padded up to a multiple of it, >= 1.
        pad_tiles_to_multiple_of: the batch's tiles, where it has any, are padded up to a multiple of it with empty ones
            at no position, >= 1.

    Returns:
        One row per row.
    """
    whole_rows = [Row((row,)) if isinstance(row, Example) else row for row in rows]
    counts = [max(sum(len(example.input_ids) for example in row.examples), 1) for row in whole_rows]
    length = -(-max(counts) // pad_to_multiple_of) * pad_to_multiple_of
    ids, position_ids, segment_ids = (np.zeros((len(rows), length), dtype=np.int64) for _ in range(3))
    labels = np.full_like(ids, IGNORE_INDEX)
    for number, (row, count) in enumerate(zip(whole_rows, counts, strict=True)):
        start = length - count if padding == "left" else 0
        # 0 means padding, which attention masks; even a row of skipped samples has one position that is not padding
        segment_ids[number, start : start + count] = 1
        for segment, example in enumerate(row.examples, start=1):
            span = slice(start, start + len(example.input_ids))
            ids[number, span], labels[number, span] = example.input_ids, example.labels
            position_ids[number, span] = np.arange(len(example.input_ids))
            segment_ids[number, span] = segment
            start = span.stop
    examples = [example for row in whole_rows for example in row.examples]
    # Tiles that came as pixels and those that came as stored features are kept apart; padding joins the pixels, where
    # there are any, because only what the tower computes needs a regular shape.
    padding_tiles = -sum(example.num_tiles for example in examples) % pad_tiles_to_multiple_of
    pixels = _stack([example.pixel_values for example in examples if len(example.pixel_values)])
    features = _stack([example.tile_features for example in examples if example.tile_features is not None])
    is_image = ids == IMAGE_TOKEN_INDEX
    loss_index, loss_targets = _supervised(labels, segment_ids)
    return Batch(
        # any valid id: the merge replaces the embedding of a visual position
        input_ids=np.where(is_image, 0, ids),
        position_ids=position_ids,
        segment_ids=segment_ids,
        pixel_values=_with_empty(pixels, padding_tiles),
        merge_index=_merge_index(examples, is_image, tokens_per_tile, padding_tiles),
        loss_index=loss_index,
        loss_targets=loss_targets,
        sources=tuple(example.source for example in examples),
        num_visual=int(is_image.sum()),
        skipped=tuple(skip for row in whole_rows for skip in row.skipped),
        tile_features=_with_empty(features, padding_tiles if pixels is None else 0),
        tile_keys=tuple(key for example in examples for key in example.tile_keys),
        tile_order=_tile_order(examples, padding_tiles),
    )


def _supervised(labels: np.ndarray, segment_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat positions whose next token is trained, and those tokens.  A sample's first token has nothing before it."""
    length = labels.shape[1]
    # shifted by one: position i predicts token i + 1, and never across the border of two packed samples
    rows, columns = np.nonzero((labels[:, 1:] != IGNORE_INDEX) & (segment_ids[:, 1:] == segment_ids[:, :-1]))
    return rows * length + columns, labels[rows, columns + 1]


def _stack(tiles: Sequence[np.ndarray]) -> np.ndarray | None:
    return np.concatenate(tiles) if tiles else None


def _with_empty(tiles: np.ndarray | None, padding: int) -> np.ndarray | None:
    if tiles is None or not padding:
        return tiles
    return np.concatenate([tiles, np.zeros((padding, *tiles.shape[1:]), dtype=tiles.dtype)])


def _tile_order(examples: Sequence[Example], padding: int) -> np.ndarray | None:
    """Puts tiles that came as pixels and tiles that came as features, in this order, into that of the samples; the
    `padding` tiles, which follow those that came as pixels, come last.

    A sum over all tiles, as in the projector's gradient, would else depend on which of them were found on the disk.
    """
    stored = np.repeat(
        [example.tile_features is not None for example in examples], [example.num_tiles for example in examples]
    )
    if stored.all() or not stored.any():
        return None
    pixels = (~stored).sum()
    # the n-th stored tile comes after all pixels and padding, the n-th decoded one is n-th
    order = np.where(stored, np.cumsum(stored) - 1 + pixels + padding, np.cumsum(~stored) - 1)
    return np.concatenate([order, np.arange(pixels, pixels + padding)])


def _merge_index(
    examples: Sequence[Example], is_image: np.ndarray, tokens_per_tile: int, padding: int
) -> np.ndarray | None:
    """Row of concat(token embeddings [B*L], tile features [N*P] of all samples and of padding, newline [1]) for each
    position."""
    tiles = sum(example.num_tiles for example in examples)
    if not tiles:
        return None
    positions = is_image.size
    newline = positions + (tiles + padding) * tokens_per_tile
    # rows of the concatenation: 0 .. positions - 1 are embeddings, then P for each tile, the newline vector last
    sources, first = [], positions
    for example in examples:
        sources.append(np.where(example.image_index == NEWLINE_INDEX, newline, example.image_index + first))
        first += example.num_tiles * tokens_per_tile
    index = np.arange(positions, dtype=np.int64)
    index[is_image.reshape(-1)] = np.concatenate(sources)
    return index
