"""The stand-ins for pickled tensors: views of a storage as they are, and every wrong description refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.checkpoints.files.pickled_tensors import (
    FileRange,
    NumpyArray,
    NumpyType,
    Storage,
    TorchTensor,
    array_from_buffer,
    rebuild_tensor,
)
from paddlemix.errors import UserError

NUMBERS = np.arange(12, dtype="<f4")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Twelve float32 numbers after 8 bytes of something else."""
    path = tmp_path / "x.bin"
    path.write_bytes(b"8 bytes." + NUMBERS.tobytes())
    return Storage("F32", "0", {"0": FileRange(path, 8, NUMBERS.nbytes)})


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "expected"),
    [
        (0, (3, 4), (4, 1), NUMBERS.reshape(3, 4)),
        (0, (4, 3), (1, 4), NUMBERS.reshape(3, 4).T),
        (5, (2, 2), (4, 1), NUMBERS.reshape(3, 4)[1:, 1:3]),
        (3, (), (), NUMBERS[3]),
        (0, (0, 4), (4, 1), np.zeros((0, 4), "f4")),
    ],
)
def test_a_view_of_a_storage(storage: Storage, offset: int, shape: Any, strides: Any, expected: np.ndarray) -> None:
    entry = rebuild_tensor(storage, offset, shape, strides).entry()
    assert (entry.dtype, entry.shape) == ("F32", shape)
    np.testing.assert_array_equal(entry.read(), expected)


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "message"),
    [
        (0, (13,), (1,), "needs 52 bytes of 48"),
        (-1, (2,), (1,), "damaged: strides"),
        (0, (2,), (1, 1), "damaged: strides"),
        (0, (1 << 30,), (0,), "use numbers more than once, which no weight does"),
    ],
)
def test_a_view_that_the_storage_does_not_have(
    storage: Storage, offset: int, shape: Any, strides: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        TorchTensor(storage, offset, shape, strides).entry()


def test_a_file_that_became_shorter_is_an_error_and_no_crash(storage: Storage) -> None:
    entry = rebuild_tensor(storage, 0, (12,), (1,)).entry()
    path = storage.ranges["0"].path
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="is cut short; copy it again"):
        entry.read()


@pytest.mark.parametrize("fortran", [False, True])
def test_a_numpy_array_in_either_order(fortran: bool) -> None:
    array, kind = NumpyArray(), NumpyType("f4")
    array.__setstate__((1, (3, 4), kind, fortran, NUMBERS.tobytes()))
    expected = NUMBERS.reshape(3, 4, order="F" if fortran else "C")
    np.testing.assert_array_equal(array.entry().read(), expected)
    same = array_from_buffer(NUMBERS.tobytes(), kind, (3, 4), "F" if fortran else "C")
    np.testing.assert_array_equal(same.entry().read(), expected)


@pytest.mark.parametrize(("code", "order"), [("f4", ">"), ("c8", "<"), ("O", "|")])
def test_types_that_no_weight_has(code: str, order: str) -> None:
    kind = NumpyType(code)
    kind.__setstate__((3, order))
    with pytest.raises(UserError, match="a pickled array has the type"):
        array_from_buffer(b"", kind, (0,), "C").entry()
