"""What is done to tensors on their way: turned, cut, joined, rounded."""

from __future__ import annotations

import numpy as np
import pytest

from paddlemix.checkpoints.files.tensors import (
    TensorEntry,
    array_entry,
    bfloat16_bits,
    convert,
    converted,
    joined,
    selected,
    transposed,
)
from paddlemix.errors import UserError
from tests.tiny_models import draw


def streamed(entry: TensorEntry) -> np.ndarray:
    """A tensor put together from its pieces, as a file gets them."""
    return np.concatenate([piece.reshape(-1).copy() for piece in entry.pieces()]).reshape(entry.shape)


@pytest.mark.parametrize("shape", [(1, 1), (64, 256), (65, 257), (3, 1000), (700, 5), (300, 600)])
def test_turning_equals_numpys(shape: tuple[int, int]) -> None:
    matrix = draw(*shape).astype("float16")
    entry = transposed(array_entry(matrix))
    assert entry.shape == shape[::-1]
    np.testing.assert_array_equal(entry.read(), matrix.T)
    np.testing.assert_array_equal(streamed(entry), matrix.T)
    assert entry.read().flags.c_contiguous


def test_turned_twice_is_the_tensor_itself() -> None:
    entry = array_entry(draw(3, 4))
    assert transposed(transposed(entry)) is entry


def test_parts_and_their_sum() -> None:
    entry = array_entry(draw(6, 4))
    np.testing.assert_array_equal(selected(entry, slice(2, 5), 0).read(), draw(6, 4)[2:5])
    picked = selected(entry, np.array([3, 0]), 1)
    assert picked.shape == (6, 2)
    np.testing.assert_array_equal(picked.read(), draw(6, 4)[:, [3, 0]])
    both = joined(selected(entry, slice(0, 1), 1), selected(entry, slice(1, 4), 1), 1)
    assert both.shape == (6, 4)
    np.testing.assert_array_equal(both.read(), draw(6, 4))


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (1.0, 0x3F80),
        (-2.0, 0xC000),
        (1.00390625, 0x3F80),  # 1 + 2**-8: half way, down to the even neighbour
        (1.01171875, 0x3F82),  # 1 + 3 * 2**-8: half way, up to the even neighbour
        (np.nextafter(np.float32(1.00390625), np.float32(2)), 0x3F81),
        (3.4e38, 0x7F80),  # beyond the largest: infinity
        (np.inf, 0x7F80),
        (-0.0, 0x8000),
        (1e-45, 0x0000),
    ],
)
def test_bfloat16_is_rounded_to_nearest_ties_to_even(value: float, bits: int) -> None:
    assert bfloat16_bits(np.array([value], dtype="float32"))[0] == bits


@pytest.mark.parametrize("raw", [0x7FC00000, 0x7F800001, 0xFFFFFFFF])
def test_not_a_number_stays_one(raw: int) -> None:
    bits = int(bfloat16_bits(np.array([raw], dtype="uint32").view("float32"))[0])
    assert bits & 0x7F80 == 0x7F80
    assert bits & 0x007F


def test_every_bfloat16_survives_float32() -> None:
    bits = np.arange(1 << 16, dtype="uint16")
    back = convert(convert(bits, "BF16", "F32"), "F32", "BF16")
    numbers = ~np.isnan((bits.astype("uint32") << 16).view("float32"))
    np.testing.assert_array_equal(back[numbers], bits[numbers])


@pytest.mark.parametrize(("source", "target"), [("F32", "F16"), ("F16", "F32"), ("F32", "BF16"), ("F16", "BF16")])
def test_a_turned_tensor_is_converted_piece_by_piece(source: str, target: str) -> None:
    matrix = draw(300, 70).astype({"F32": "float32", "F16": "float16"}[source])
    entry = converted(transposed(array_entry(matrix)), target)
    assert (entry.dtype, entry.shape) == (target, (70, 300))
    np.testing.assert_array_equal(entry.read(), convert(matrix.T, source, target))
    np.testing.assert_array_equal(streamed(entry), entry.read())


def test_integers_are_not_converted() -> None:
    entry = array_entry(np.arange(3))
    assert converted(entry, "F16") is entry


def test_a_number_too_large_for_float16_is_named() -> None:
    with pytest.raises(UserError, match="a weight of 70000 is too large for float16; use bfloat16 or float32"):
        convert(np.array([1, 7e4], dtype="float32"), "F32", "F16")
    assert np.isinf(convert(np.array([np.inf], dtype="float32"), "F32", "F16"))[0]
