"""Examples -> Batch, checked against loops and against an embedding gathered by hand."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddlemix.datasets.collate import collate
from paddlemix.processors.tokenizer import Tokenizer
from paddlemix.sample import IGNORE_INDEX, IMAGE_TOKEN_INDEX, NEWLINE_INDEX, Batch, Example
from tests.tiny import ANYRES_SPEC, make_processor, make_sample, noise_picture

Side = Literal["right", "left"]
SIDES: list[Side] = ["right", "left"]
PER_TILE = 4


def build_example(length: int, tiles: int, seed: int) -> Example:
    """Random ids, labels on random positions, and visual tokens that read random rows of `tiles` tiles."""
    random = np.random.default_rng(seed)
    ids = random.integers(1, 400, length)
    visual = random.integers(0, 2, length).astype(bool) & (tiles > 0)
    ids[visual] = IMAGE_TOKEN_INDEX
    trained = random.integers(0, 2, length).astype(bool) & ~visual
    return Example(
        input_ids=ids,
        labels=np.where(trained, ids, IGNORE_INDEX),
        pixel_values=random.random((tiles, 3, 2, 2), dtype=np.float32),
        image_index=random.integers(NEWLINE_INDEX, max(tiles * PER_TILE, 1), int(visual.sum())),
        source=f"example {seed}",
    )


EXAMPLES = st.lists(
    st.builds(build_example, length=st.integers(1, 12), tiles=st.integers(0, 3), seed=st.integers(0, 999)),
    min_size=1,
    max_size=4,
)


def offset(example: Example, batch: Batch, padding: Side) -> int:
    return batch.input_ids.shape[1] - len(example.input_ids) if padding == "left" else 0


@pytest.mark.parametrize("padding", SIDES)
@given(examples=EXAMPLES)
def test_ids_positions_and_segments(examples: list[Example], padding: Side) -> None:
    batch = collate(examples, PER_TILE, padding)
    length = max(len(example.input_ids) for example in examples)
    ids, positions, segments = np.zeros((3, len(examples), length), dtype=np.int64)
    for row, example in enumerate(examples):
        for place, token in enumerate(example.input_ids):
            column = place + offset(example, batch, padding)
            ids[row, column] = 0 if token == IMAGE_TOKEN_INDEX else token
            positions[row, column] = place
            segments[row, column] = 1
    np.testing.assert_array_equal(batch.input_ids, ids)
    np.testing.assert_array_equal(batch.position_ids, positions)
    np.testing.assert_array_equal(batch.segment_ids, segments)
    assert batch.sources == tuple(example.source for example in examples)
    for values in (batch.input_ids, batch.position_ids, batch.segment_ids, batch.loss_index, batch.loss_targets):
        assert values.dtype == np.int64


@pytest.mark.parametrize("padding", SIDES)
@given(examples=EXAMPLES)
def test_loss_positions(examples: list[Example], padding: Side) -> None:
    """The position before a trained token predicts it; a sample's first token has no such position."""
    batch = collate(examples, PER_TILE, padding)
    expected = []
    for row, example in enumerate(examples):
        for place, label in enumerate(example.labels):
            if label != IGNORE_INDEX and place > 0:
                column = place + offset(example, batch, padding)
                expected.append((row * batch.input_ids.shape[1] + column - 1, label))
    assert list(zip(batch.loss_index.tolist(), batch.loss_targets.tolist(), strict=True)) == expected


def by_hand(examples: list[Example], batch: Batch, table: np.ndarray, newline: np.ndarray, padding: Side) -> np.ndarray:
    """Embeddings [B, L, 1]: a tile's features are its own pixels' sum and the row's number, padding is token 0."""
    merged = np.tile(table[0], (*batch.input_ids.shape, 1))
    for row, example in enumerate(examples):
        features = feature_rows(example.pixel_values)
        rows = iter(example.image_index)
        for place, token in enumerate(example.input_ids):
            column = place + offset(example, batch, padding)
            if token != IMAGE_TOKEN_INDEX:
                merged[row, column] = table[token]
                continue
            index = next(rows)
            merged[row, column] = newline if index == NEWLINE_INDEX else features[index]
    return merged


def feature_rows(pixels: np.ndarray) -> np.ndarray:
    """Stands in for tower and projector: [N, 3, H, W] -> [N * P, 1]."""
    return (pixels.sum(axis=(1, 2, 3))[:, None] + 1000 * np.arange(1, PER_TILE + 1)).reshape(-1, 1)


@pytest.mark.parametrize("padding", SIDES)
@given(examples=EXAMPLES)
def test_merge_index_gathers_what_stands_there(examples: list[Example], padding: Side) -> None:
    check_merge(examples, collate(examples, PER_TILE, padding), padding)


def check_merge(examples: list[Example], batch: Batch, padding: Side) -> None:
    tiles = [example.pixel_values for example in examples if len(example.pixel_values)]
    if not tiles:
        assert batch.merge_index is None
        assert batch.pixel_values is None
        return
    assert batch.merge_index is not None and batch.pixel_values is not None
    np.testing.assert_array_equal(batch.pixel_values, np.concatenate(tiles))
    table, newline = -np.arange(500.0)[:, None], np.array([0.5])
    embeddings = table[batch.input_ids.reshape(-1)]
    everything = np.concatenate([embeddings, feature_rows(batch.pixel_values), newline[None]])
    merged = everything[batch.merge_index].reshape(*batch.input_ids.shape, 1)
    np.testing.assert_array_equal(merged, by_hand(examples, batch, table, newline, padding))


@pytest.mark.parametrize("padding", SIDES)
def test_mixed_batch_of_real_examples(tokenizer: Tokenizer, padding: Side) -> None:
    processor = make_processor(tokenizer, ANYRES_SPEC)
    examples = [
        processor.encode(make_sample("Hello!", "Hi"), []),
        processor.encode(
            make_sample("<image> or <image>?", "No", "<image>\nQ", "A cat."),
            [noise_picture(*size) for size in ((60, 40), (9, 90), (28, 28))],
        ),
        processor.encode(make_sample("Q", "A longer answer. " * 9), []),
        processor.encode(make_sample("<image>\nQ", "A"), [noise_picture(30, 31)]),
    ]
    batch = collate(examples, ANYRES_SPEC.tokens_per_tile, padding)
    check_merge(examples, batch, padding)
    trained = [token for example in examples for token in example.labels.tolist() if token != IGNORE_INDEX]
    assert batch.loss_targets.tolist() == trained
    assert batch.sources == ("test.json record 0",) * 4


def test_batch_without_image() -> None:
    batch = collate([build_example(3, 0, 1), build_example(5, 0, 2)], PER_TILE)
    assert batch.merge_index is None and batch.pixel_values is None
    assert batch.input_ids.shape == (2, 5)
