"""The key/value cache: what is held, how it grows, and that what is interrupted leaves nothing half done."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from paddlemix.models.kv_cache import KVCache
from tests.tiny_models import draw


def append(cache: KVCache, layer: int, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = cache.append(layer, paddle.to_tensor(keys), paddle.to_tensor(values))
    return first.numpy(), second.numpy()


def test_it_appends_per_layer_and_truncates() -> None:
    cache, first, second = KVCache(), draw(1, 3, 2, 4, seed=1), draw(1, 2, 2, 4, seed=2)
    assert cache.length == 0
    for layer in range(2):
        append(cache, layer, first + layer, -first)
    keys, values = append(cache, 1, second, second)
    np.testing.assert_array_equal(keys, np.concatenate([first + 1, second], axis=1))
    np.testing.assert_array_equal(values, np.concatenate([-first, second], axis=1))

    append(cache, 0, second, second)
    cache.segment_ids = paddle.to_tensor([[0, 1, 1, 1, 1]])
    cache.truncate(9)
    assert cache.length == 5
    cache.truncate(2)
    assert cache.length == 2
    assert cache.segment_ids.tolist() == [[0, 1]]
    keys, _ = append(cache, 0, second, second)
    np.testing.assert_array_equal(keys, np.concatenate([first[:, :2], second], axis=1))


@pytest.mark.parametrize("limit", [None, 150, 300])
def test_it_grows_without_changing_what_it_holds(limit: int | None) -> None:
    """Position by position over several enlargements, two rows and grouped heads."""
    cache, whole = KVCache(limit), draw(2, 150, 3, 4)
    append(cache, 0, whole[:, :5], -whole[:, :5])
    rooms = set()
    for place in range(5, 150):
        keys, values = append(cache, 0, whole[:, place : place + 1], -whole[:, place : place + 1])
        rooms.add(cache.room)
    np.testing.assert_array_equal(keys, whole)
    np.testing.assert_array_equal(values, -whole)
    assert sorted(rooms) == [64, 128, 150 if limit == 150 else 192]
    assert cache.num_bytes == 2 * 2 * 3 * cache.room * 4 * 4


def test_one_more_position_copies_nothing_that_is_there() -> None:
    """The buffers stay where they are in memory."""
    cache = KVCache()
    append(cache, 0, draw(1, 3, 2, 4), draw(1, 3, 2, 4))
    place = cache._layers[0].keys.data_ptr()
    for _ in range(20):
        cache.write(0, paddle.to_tensor(draw(1, 2, 1, 4)), paddle.to_tensor(draw(1, 2, 1, 4)))
    assert cache._layers[0].keys.data_ptr() == place and cache.length == 23


def test_what_a_kernel_writes_counts_from_then_on() -> None:
    """Into the buffers themselves, behind what a layer holds; each layer advances on its own."""
    cache, first, second = KVCache(), draw(2, 3, 2, 4), draw(2, 2, 2, 4, seed=2)
    for layer in range(2):
        append(cache, layer, first + layer, -first)
    for layer in range(2):
        for buffer, part in zip(cache.buffers(layer), (second + layer, -second), strict=True):
            assert buffer.shape == [2 * 2 * cache.room, 4]
            places = (np.arange(4)[:, None] * cache.room + [3, 4]).reshape(-1)  # of rows and heads
            rows = part.transpose(0, 2, 1, 3).reshape(-1, 4)
            paddle.index_put_(buffer, (paddle.to_tensor(places),), paddle.to_tensor(rows))
        assert cache.length == 3  # of both layers, or of the one that has not advanced
        cache.advance(layer, 2)
    assert cache.length == 5
    third = draw(2, 1, 2, 4, seed=3)
    for layer in range(2):
        keys, values = append(cache, layer, third, third)
        np.testing.assert_array_equal(keys, np.concatenate([first + layer, second + layer, third], axis=1))
        np.testing.assert_array_equal(values, np.concatenate([-first, -second, third], axis=1))


def test_buffers_are_those_that_grew_and_those_of_the_chosen_rows() -> None:
    cache = KVCache()
    append(cache, 0, draw(2, 3, 2, 4), draw(2, 3, 2, 4))
    assert cache.room == 64 and [part.shape for part in cache.buffers(0)] == [[256, 4]] * 2
    cache.reserve(65)
    assert [part.shape for part in cache.buffers(0)] == [[2 * 2 * cache.room, 4]] * 2 and cache.room == 128
    cache.select(np.array([1]))
    keys, _ = cache.buffers(0)
    held = keys.numpy().reshape(1, 2, 128, 4)[:, :, :3]
    np.testing.assert_array_equal(held, draw(2, 3, 2, 4)[1:].transpose(0, 2, 1, 3))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_its_type_is_that_of_the_first_keys(dtype: str) -> None:
    cache = KVCache()
    assert cache.dtype is None
    part = paddle.to_tensor(draw(1, 2, 1, 4)).astype(dtype)
    cache.append(0, part, part)
    assert cache.dtype == part.dtype
    cache.append(0, part.astype("float32"), part.astype("float32"))
    assert cache.dtype == part.dtype
    cache.truncate(0)
    assert cache.dtype is None


def test_rows_can_be_chosen_and_repeated() -> None:
    cache, first = KVCache(), draw(3, 2, 2, 4)
    append(cache, 0, first, first)
    cache.segment_ids = paddle.to_tensor([[0, 1], [1, 1], [1, 1]])
    cache.select(np.array([2, 0, 0, 1]))
    second = draw(4, 1, 2, 4, seed=3)
    keys, _ = append(cache, 0, second, second)
    np.testing.assert_array_equal(keys, np.concatenate([first[[2, 0, 0, 1]], second], axis=1))
    assert cache.segment_ids is not None and cache.segment_ids.tolist() == [[1, 1], [0, 1], [0, 1], [1, 1]]


def test_it_holds_no_graph_and_keeps_its_type() -> None:
    cache, keys = KVCache(), paddle.to_tensor(draw(1, 2, 1, 4), stop_gradient=False)
    cache.append(0, keys * 2, keys * 3)
    found, _ = cache.append(0, (keys * 2).astype("float64"), keys)
    assert found.stop_gradient and found.dtype == paddle.float32


def test_what_is_interrupted_while_it_grows_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KVCache()
    for layer in range(2):
        append(cache, layer, draw(1, 3, 2, 4), draw(1, 3, 2, 4))

    def stop(part: paddle.Tensor, room: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("paddlemix.models.kv_cache._lengthened", stop)
    with pytest.raises(KeyboardInterrupt):
        cache.reserve(1000)
    monkeypatch.undo()
    assert cache.length == 0
    append(cache, 0, draw(2, 3, 2, 4), draw(2, 3, 2, 4))
    assert cache.length == 3


def test_of_layers_that_an_interruption_left_uneven_the_shortest_counts() -> None:
    cache = KVCache()
    for layer in range(2):
        append(cache, layer, draw(1, 3, 2, 4), draw(1, 3, 2, 4))
    append(cache, 0, draw(1, 1, 2, 4), draw(1, 1, 2, 4))
    assert cache.length == 3
    cache.truncate(3)
    keys, _ = append(cache, 0, draw(1, 1, 2, 4, seed=7), draw(1, 1, 2, 4))
    assert keys.shape[1] == 4
