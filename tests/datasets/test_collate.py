"""Rows -> Batch, checked against loops, against an embedding gathered by hand, and packed against one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddlemix.datasets.collate import collate
from paddlemix.processors.text.tokenizer import Tokenizer
from paddlemix.sample import IGNORE_INDEX, IMAGE_TOKEN_INDEX, NEWLINE_INDEX, Batch, Example, Row, Skip
from tests.rows import PER_TILE, build_example
from tests.tiny import ANYRES_SPEC, make_processor, make_sample, noise_picture

Side = Literal["right", "left"]
SIDES: list[Side] = ["right", "left"]

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


ROWS = st.lists(st.lists(EXAMPLES.map(lambda found: found[0]), max_size=4), min_size=1, max_size=3)


@pytest.mark.parametrize("padding", SIDES)
@given(rows=ROWS)
def test_a_packed_row_is_its_samples_one_behind_the_other(rows: list[list[Example]], padding: Side) -> None:
    batch = collate([Row(tuple(row)) for row in rows], PER_TILE, padding)
    length = batch.input_ids.shape[1]
    trained = dict(zip(batch.loss_index.tolist(), batch.loss_targets.tolist(), strict=True))
    count = 0
    for number, row in enumerate(rows):
        place = number * length
        if padding == "left":
            place += length - max(sum(len(example.input_ids) for example in row), 1)
        for segment, example in enumerate(row, start=1):
            alone, size = collate([example], PER_TILE), len(example.input_ids)
            span = slice(place, place + size)
            np.testing.assert_array_equal(batch.input_ids.reshape(-1)[span], alone.input_ids[0])
            np.testing.assert_array_equal(batch.position_ids.reshape(-1)[span], np.arange(size))
            assert (batch.segment_ids.reshape(-1)[span] == segment).all()
            wanted = dict(zip((alone.loss_index + place).tolist(), alone.loss_targets.tolist(), strict=True))
            assert {index: token for index, token in trained.items() if place <= index < place + size} == wanted
            count += len(wanted)
            place += size
    assert count == len(trained)  # nothing else is trained: no token learns from the sample before
    assert batch.num_visual == sum(len(example.image_index) for row in rows for example in row)
    assert batch.sources == tuple(example.source for row in rows for example in row)


@given(rows=ROWS)
def test_packed_images_stand_in_their_places(rows: list[list[Example]]) -> None:
    """Gathering from a packed batch gives what gathering from each sample alone gives."""
    batch = collate([Row(tuple(row)) for row in rows], PER_TILE)
    examples = [example for row in rows for example in row]
    if batch.merge_index is None or batch.pixel_values is None:
        assert not any(len(example.pixel_values) for example in examples)
        return
    np.testing.assert_array_equal(
        batch.pixel_values, np.concatenate([part.pixel_values for part in examples if len(part.pixel_values)])
    )
    table, newline = -np.arange(500.0)[:, None], np.array([0.5])
    # in a packed batch tile features follow each other over all samples: tell them apart by tile and row
    features = np.arange(len(batch.pixel_values) * PER_TILE)[:, None] + 1000.0
    everything = np.concatenate([table[batch.input_ids.reshape(-1)], features, newline[None]])
    found = everything[batch.merge_index][batch.segment_ids.reshape(-1) > 0]
    wanted, first = [], 0
    for row in rows:
        for example in row:
            ids = example.input_ids.copy()
            values = table[np.where(ids == IMAGE_TOKEN_INDEX, 0, ids)]
            own = np.where(example.image_index == NEWLINE_INDEX, 0.5, example.image_index + first + 1000.0)
            values[ids == IMAGE_TOKEN_INDEX] = own[:, None]
            wanted.append(values)
            first += len(example.pixel_values) * PER_TILE
        if not row:
            wanted.append(table[:1])  # the one position of a row without samples
    np.testing.assert_array_equal(found, np.concatenate(wanted))


def test_a_row_whose_samples_were_all_skipped_keeps_its_place() -> None:
    skip = Skip(7, "train.json record 7: image 'a.png' is broken")
    batch = collate([Row((), (skip,)), build_example(3, 0, 1)], PER_TILE)
    assert batch.skipped == (skip,)
    assert batch.segment_ids.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch.input_ids[0].tolist() == [0, 0, 0]
    assert (batch.loss_index >= 3).all()


def test_a_batch_of_nothing_but_skipped_samples_has_a_shape() -> None:
    batch = collate([Row(()), Row(())], PER_TILE)
    assert batch.input_ids.shape == (2, 1)
    assert batch.loss_index.size == batch.num_visual == 0
    assert batch.merge_index is None and batch.pixel_values is None and batch.sources == ()


def test_rows_are_padded_to_a_multiple() -> None:
    examples = [build_example(9, 1, 1), build_example(5, 0, 2)]
    batch, plain = collate(examples, PER_TILE, pad_to_multiple_of=8), collate(examples, PER_TILE)
    assert batch.input_ids.shape == (2, 16)
    np.testing.assert_array_equal(batch.input_ids[:, :9], plain.input_ids)
    assert not batch.segment_ids[:, 9:].any()
    assert batch.loss_targets.tolist() == plain.loss_targets.tolist()
    assert collate(examples, PER_TILE, pad_to_multiple_of=9).input_ids.shape == (2, 9)


def with_features(example: Example) -> Example:
    """The same, its tiles as features that the tower gave earlier: four numbers, all of them the tile's number."""
    numbers = np.arange(example.num_tiles, dtype=np.float32)
    features = np.tile(numbers[:, None, None], (1, PER_TILE, 4))
    return replace(example, tile_features=features, pixel_values=example.pixel_values[:0])


@pytest.mark.parametrize("stored", [(), (0,), (1,), (0, 1, 2)])
def test_tiles_are_padded_to_a_multiple(stored: tuple[int, ...]) -> None:
    """As pixels, as stored features or as both: the same rows stand at the same positions, and padding at none."""
    examples = [build_example(9, 2, 1), build_example(6, 1, 2), build_example(9, 2, 3)]
    examples = [with_features(part) if number in stored else part for number, part in enumerate(examples)]
    plain, batch = collate(examples, PER_TILE), collate(examples, PER_TILE, pad_tiles_to_multiple_of=4)
    assert [rows_seen(found, 5) for found in (plain, batch)] == [5, 8]
    assert plain.merge_index is not None and batch.merge_index is not None
    positions = plain.input_ids.size
    newline = [positions + tiles * PER_TILE for tiles in (5, 8)]
    np.testing.assert_array_equal(
        np.where(plain.merge_index == newline[0], newline[1], plain.merge_index), batch.merge_index
    )
    inner = batch.merge_index[batch.merge_index != newline[1]]
    assert inner.max() < newline[0]
    again = collate(examples, PER_TILE, pad_tiles_to_multiple_of=5)
    np.testing.assert_array_equal(again.merge_index, plain.merge_index)


def rows_seen(batch: Batch, real: int) -> int:
    """Tiles that the projector gets; the first `real` of them are those of the samples, in order."""
    pixels = 0 if batch.pixel_values is None else len(batch.pixel_values)
    features = 0 if batch.tile_features is None else len(batch.tile_features)
    if batch.tile_order is None:
        assert not (pixels and features)
        return pixels + features
    assert len(set(batch.tile_order[:real])) == real and batch.pixel_values is not None
    assert all(not batch.pixel_values[number].any() for number in batch.tile_order[real:])
    assert sorted(batch.tile_order) == list(range(pixels + features))
    return len(batch.tile_order)


def test_a_batch_without_image_gets_no_tiles() -> None:
    batch = collate([build_example(5, 0, 2)], PER_TILE, pad_tiles_to_multiple_of=4)
    assert batch.pixel_values is None and batch.merge_index is None
