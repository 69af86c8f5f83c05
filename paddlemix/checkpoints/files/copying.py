"""A weight of a file into a parameter, now or later."""

from __future__ import annotations

import ctypes

import numpy as np
import paddle

from paddlemix.checkpoints.files.finite import finite
from paddlemix.checkpoints.files.tensors import (
    FLOAT_TYPES,
    NUMPY_TYPES,
    TensorEntry,
    converted,
    flat_slice,
    selected,
    transposed,
)
from paddlemix.parallel.deferred import Reader
from paddlemix.parallel.tensor.parts import Part


def reader(entry: TensorEntry, name: str) -> Reader:
    """What reads a weight later, or the part of it that a process keeps; see `parallel.deferred`.

    Args:
        name: for messages.
    """

    def read(target: paddle.Tensor, part: tuple[int, int] | None) -> None:
        wanted = entry if part is None else flat_slice(entry, *part, int(target.shape[0]))
        copy_into(target, finite(wanted, name))

    return read


def own_part(entry: TensorEntry, part: Part | None) -> TensorEntry:
    """What a process reads of a weight: its part, and no more of the file than is needed; all where `part` is None."""
    if part is None:
        return entry
    if entry.turned_from is not None:  # our rows are the file's columns
        return transposed(selected(entry.turned_from, part.places, 1 - part.axis))
    return selected(entry, part.places, part.axis)


def copy_into(parameter: paddle.Tensor, entry: TensorEntry) -> None:
    """Reads a weight and copies it into a parameter of the same shape, converted to the parameter's dtype.

    | parameter on            | way                                                                              |
    |-------------------------|----------------------------------------------------------------------------------|
    | a CPU, contiguous       | piece by piece into its memory: an output layer of 7B would exist three times    |
    | a device, transposed    | as in its file, transposed there: the host needs a minute for the matrices of 7B |
    | anything else           | by `set_value`                                                                   |

    Raises:
        UserError: a finite number is too large for float16.
    """
    dtype = FLOAT_TYPES[str(parameter.dtype).rsplit(".", 1)[-1]]  # "paddle.float32" -> "F32"
    turned_from, entry = entry.turned_from, converted(entry, dtype)
    if not parameter.place.is_cpu_place() and turned_from is not None:
        held = paddle.to_tensor(np.ascontiguousarray(converted(turned_from, dtype).read()))
        with paddle.no_grad():
            parameter.copy_(held.transpose([1, 0]).contiguous(), False)
        return
    if not (parameter.place.is_cpu_place() and parameter.is_contiguous()):
        parameter.set_value(np.ascontiguousarray(entry.read()))
        return
    memory, start = _memory_of(parameter, NUMPY_TYPES[dtype]), 0
    for piece in entry.pieces():
        memory[start : start + piece.size] = piece.reshape(-1)
        start += piece.size
    assert start == memory.size


def _memory_of(parameter: paddle.Tensor, dtype: np.dtype) -> np.ndarray:
    """The numbers of a contiguous parameter on a CPU, flat, in place."""
    # paddle has no view of a parameter for numpy: `numpy()` copies
    size = parameter.size * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(parameter.data_ptr()), dtype=dtype)
