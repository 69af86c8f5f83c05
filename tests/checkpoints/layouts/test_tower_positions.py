"""Position embeddings interpolated for another image size, against torch's numbers and by their properties."""

from __future__ import annotations

import numpy as np
import pytest

from paddlemix.checkpoints.files.tensors import array_entry, bfloat16_bits
from paddlemix.checkpoints.layouts.tower_positions import interpolate, resized_positions, table_side
from paddlemix.errors import UserError
from tests.tiny_models import draw

# torch 2.13.0: interpolate(mode="bicubic", align_corners=False) of 0, 1, 4, 9, ... 64 as a grid of 3 x 3
TORCH = {
    5: [
        [-0.9047037, -0.8740149, -0.4399992, 1.0740172, 2.2167058],
        [1.269992, 2.3191466, 4.4440107, 7.648876, 9.81003],
        [8.328001, 11.068004, 16.0, 22.012001, 25.864002],
        [25.10602, 29.536871, 37.276, 46.095142, 51.637993],
        [37.28871, 42.73803, 52.16801, 62.677998, 69.23932],
    ],
    2: [[1.4307556, 6.5223694], [32.39737, 53.180756]],
}


def table(side: int, width: int = 3) -> np.ndarray:
    return draw(1 + side * side, width)


@pytest.mark.parametrize("side", TORCH)
def test_numbers_are_those_of_torch(side: int) -> None:
    squares = np.concatenate([[7.0], np.arange(9.0) ** 2]).astype("float32").reshape(10, 1)
    found = interpolate(squares, side)
    assert found.dtype == np.float32
    assert found[0, 0] == 7
    np.testing.assert_allclose(found[1:].reshape(side, side), TORCH[side], rtol=1e-5)


@pytest.mark.parametrize(("before", "after"), [(16, 24), (16, 32), (24, 16), (1, 3), (5, 4)])
def test_the_class_token_stays_and_channels_do_not_mix(before: int, after: int) -> None:
    whole = table(before)
    found = interpolate(whole, after)
    assert found.shape == (1 + after * after, 3)
    np.testing.assert_array_equal(found[0], whole[0])
    for channel in range(3):
        np.testing.assert_array_equal(found[:, channel], interpolate(whole[:, channel : channel + 1], after)[:, 0])


def test_a_grid_of_one_value_stays_so_and_the_same_size_changes_nothing() -> None:
    np.testing.assert_allclose(interpolate(np.full((17, 2), 0.3, "float32"), 7), 0.3, rtol=1e-6)
    whole = table(6)
    np.testing.assert_array_equal(interpolate(whole, 6), whole)


def test_rows_are_down_and_columns_across() -> None:
    """A grid that grows downwards alone still does."""
    down = np.concatenate([[0.0], np.repeat(np.arange(4.0), 4)]).astype("float32").reshape(17, 1)
    found = interpolate(down, 6)[1:].reshape(6, 6)
    assert (np.diff(found, axis=0) > 0).all()
    np.testing.assert_allclose(np.diff(found, axis=1), 0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_table_keeps_its_type_and_is_computed_in_float32(dtype: str) -> None:
    whole = table(4)
    stored = {"F32": whole, "F16": whole.astype("float16"), "BF16": bfloat16_bits(whole.reshape(-1)).reshape(17, 3)}
    entry = resized_positions(array_entry(stored[dtype], dtype), 6)
    assert (entry.dtype, entry.shape) == (dtype, (37, 3))
    found = entry.read()
    assert (found.dtype, found.shape) == (stored[dtype].dtype, (37, 3))
    values = (found.astype("uint32") << 16).view("float32") if dtype == "BF16" else found.astype("float32")
    np.testing.assert_allclose(values, interpolate(whole, 6), atol={"F32": 0, "F16": 2e-3, "BF16": 2e-2}[dtype])


@pytest.mark.parametrize("rows", [0, 1, 16, 256])
def test_a_table_without_a_square_grid_is_refused(rows: int) -> None:
    with pytest.raises(UserError, match=f"a table of {rows} position embeddings is not a class token and a square"):
        table_side(rows)
