"""Masks, rotary positions and the cache, against what their definitions say."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from paddlemix.models.attention import DenseMask, attend, attention_bias
from paddlemix.models.rotary import Rope, rotary_tables, rotate
from tests.tiny_models import draw

pytestmark = pytest.mark.usefixtures("form")  # in C and in paddle's operators


def rotated(states: np.ndarray, positions: list[int]) -> np.ndarray:
    """[1, L, heads, E] at the given positions."""
    heads, width = states.shape[2:]
    tables = rotary_tables(paddle.to_tensor([positions]), heads, Rope(head_size=width), paddle.float32)
    return rotate(paddle.to_tensor(states), tables).numpy()


def allowed(*arguments: object) -> list[list[int]]:
    """1 where the bias lets a query look, of the first row."""
    bias = attention_bias(*arguments)
    assert bias is not None
    return (bias.numpy().reshape([-1, *bias.shape[-2:]])[0] == 0).astype(int).tolist()


def test_a_query_sees_itself_and_what_is_before_it() -> None:
    assert allowed(3, 3, None, None) == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_queries_behind_a_cache_see_all_of_it() -> None:
    assert allowed(2, 4, None, None) == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_one_query_needs_no_mask() -> None:
    assert attention_bias(1, 9, None, None) is None


def test_a_window_counts_the_query_itself() -> None:
    assert allowed(4, 4, None, None, 2) == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert allowed(2, 4, None, None, 3) == [[1, 1, 1, 0], [0, 1, 1, 1]]
    assert allowed(1, 4, None, None, 1) == [[0, 0, 0, 1]]
    assert attention_bias(1, 4, None, None, 4) is None
    assert allowed(3, 3, None, None, 3) == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_a_window_ends_with_its_segment() -> None:
    segments = paddle.to_tensor([[1, 1, 1, 2]])
    assert allowed(4, 4, segments, segments, 2) == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]


def test_a_query_sees_its_own_segment_only() -> None:
    segments = paddle.to_tensor([[1, 1, 2, 2]])
    assert allowed(4, 4, segments, segments) == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_one_query_still_does_not_see_padding() -> None:
    assert allowed(1, 4, paddle.to_tensor([[1]]), paddle.to_tensor([[0, 0, 1, 1]])) == [[0, 0, 1, 1]]


def test_the_mask_is_float32_and_finite() -> None:
    """In float16 the number would be infinite, and 0 times infinity is no number."""
    bias = attention_bias(3, 3, None, None)
    assert bias is not None
    assert bias.dtype == paddle.float32
    assert np.isfinite(bias.numpy()).all()


def test_attention_is_the_softmax_of_scaled_products() -> None:
    queries, keys, values = (draw(1, 3, 2, 4, seed=seed) for seed in (1, 2, 3))
    found = attend(*(paddle.to_tensor(part) for part in (queries, keys, values))).numpy()
    for head in range(2):
        scores = np.exp(queries[0, :, head] @ keys[0, :, head].T / 2)
        wanted = scores / scores.sum(-1, keepdims=True) @ values[0, :, head]
        np.testing.assert_allclose(found[0, :, head * 4 : head * 4 + 4], wanted, atol=1e-6)


def test_grouped_heads_share_keys_in_order() -> None:
    queries = paddle.to_tensor(draw(2, 3, 6, 4))
    keys, values = draw(2, 5, 2, 4, seed=2), draw(2, 5, 2, 4, seed=3)
    grouped = attend(queries, paddle.to_tensor(keys), paddle.to_tensor(values))
    repeated = (paddle.to_tensor(np.repeat(part, 3, axis=2)) for part in (keys, values))  # heads 0 0 0 1 1 1
    np.testing.assert_array_equal(grouped.numpy(), attend(queries, *repeated).numpy())


def test_a_fully_masked_row_stays_finite() -> None:
    states = paddle.to_tensor(draw(1, 2, 1, 4))
    assert np.isfinite(attend(states, states, states, DenseMask(paddle.full([1, 1, 2, 2], -1e9))).numpy()).all()


def test_position_0_turns_nothing() -> None:
    states = draw(1, 2, 3, 6)
    np.testing.assert_array_equal(rotated(states, [0, 0]), states)


def test_rotation_turns_the_two_halves_by_position_times_frequency() -> None:
    states = np.zeros((1, 1, 1, 4), dtype="float32")
    states[..., 1] = 1.0  # the second pair of the halves: columns 1 and 3
    turned = rotated(states, [5])[0, 0, 0]
    angle = 5 * 10000.0**-0.5
    np.testing.assert_allclose(turned, [0, np.cos(angle), 0, np.sin(angle)], atol=1e-6)


@pytest.mark.parametrize("shift", [1, 40])
def test_products_depend_on_distance_alone(shift: int) -> None:
    query, key = draw(1, 1, 1, 8, seed=1), draw(1, 1, 1, 8, seed=2)
    near = (rotated(query, [7]) * rotated(key, [3])).sum()
    far = (rotated(query, [7 + shift]) * rotated(key, [3 + shift])).sum()
    assert near == pytest.approx(far, abs=1e-4)
