"""Tensors that have not been read yet: type, shape and how to read them, and what can be done with them unread.

A bfloat16 tensor is a numpy uint16 array here, as it is for paddle.  Knows no file and no weight's meaning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paddlemix.errors import UserError

NUMPY_TYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_ITEM_BYTES = {name: np.dtype(kind).itemsize for name, kind in NUMPY_TYPES.items()}
FLOAT_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# Rows and columns that are transposed, and elements that are converted, at once: they stay in the processor's cache.
_ROWS, _COLUMNS = 64, 256
_CHUNK = 1 << 20
_MAX_AXES, _MAX_SIZE = 16, 1 << 40  # of a shape; numpy's own limits are not much higher


@dataclass(frozen=True)
class TensorEntry:
    """A tensor that has not been read yet.

    Args:
        dtype: as safetensors names it, e.g. "F16", "BF16".
        shape: its shape.
        read: reads it into a numpy array of that shape; bfloat16 as uint16.
        turned_from: the matrix that this one is the transpose of, if it was made so.
        stream: yields the same numbers piece by piece, in order; each piece is valid until the next.
        origin: its own name and file, for messages, e.g. "'model.norm.weight' of vicuna-7b"; "" if unknown.
        share: what another process calls while this one reads, where its numbers are on several; None where they are
            here.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    turned_from: TensorEntry | None = None
    stream: Callable[[], Iterator[np.ndarray]] | None = None
    origin: str = ""
    share: Callable[[], object] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return count_bytes(self.dtype, self.shape)

    def pieces(self) -> Iterator[np.ndarray]:
        """Its numbers in order, as contiguous arrays; each is valid until the next is asked for.

        New memory is the largest cost here, so what is transposed or converted goes through one small buffer.
        """
        if self.stream is None:
            yield np.ascontiguousarray(self.read())
        else:
            yield from self.stream()


Tensors = Mapping[str, TensorEntry]


def count_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor on disk."""
    return math.prod(shape) * _ITEM_BYTES[dtype]


def is_shape(value: Any) -> bool:
    """Whether a value that a file holds is the shape of some tensor: a short list of whole numbers from 0."""
    if not isinstance(value, list | tuple) or len(value) > _MAX_AXES:
        return False
    return all(type(size) is int and 0 <= size <= _MAX_SIZE for size in value)


def array_entry(array: np.ndarray, dtype: str | None = None) -> TensorEntry:
    """Wraps an array in memory; `dtype` is needed where numpy's type is ambiguous, i.e. "BF16" for uint16."""
    names = {np.dtype(kind): name for name, kind in NUMPY_TYPES.items()}
    return TensorEntry(dtype or names[array.dtype], tuple(array.shape), lambda: array)


def transposed(entry: TensorEntry) -> TensorEntry:
    """The transposed matrix, read when it is needed; transposed twice it is the first one again."""
    # torch -> ours -> torch, as in a conversion, then costs nothing
    if entry.turned_from is not None:
        return entry.turned_from

    def strips() -> Iterator[np.ndarray]:
        return _turned_strips(entry.read())

    def read() -> np.ndarray:
        turned = np.empty(entry.shape[::-1], dtype=NUMPY_TYPES[entry.dtype])
        first = 0
        for strip in strips():
            turned[first : first + len(strip)] = strip
            first += len(strip)
        return turned

    return TensorEntry(entry.dtype, entry.shape[::-1], read, turned_from=entry, stream=strips, origin=entry.origin)


def _turned_strips(matrix: np.ndarray) -> Iterator[np.ndarray]:
    """The transpose of a matrix, some rows at a time, assembled from blocks that fit the processor's cache."""
    # a direct transpose of a wide matrix uses one number of each cache line that it loads
    rows, columns = matrix.shape
    buffer = np.empty((min(_COLUMNS, columns), rows), dtype=matrix.dtype)
    tile = np.empty(
        (_ROWS, _COLUMNS), dtype=matrix.dtype
    )  # transposing from here is twice as fast as from the wide matrix
    for column in range(0, columns, _COLUMNS):
        strip = buffer[: min(_COLUMNS, columns - column)]
        for row in range(0, rows, _ROWS):
            block = tile[: min(_ROWS, rows - row), : len(strip)]
            np.copyto(block, matrix[row : row + _ROWS, column : column + _COLUMNS])
            strip[:, row : row + _ROWS] = block.T
        yield strip


def selected(entry: TensorEntry, columns: np.ndarray | slice, axis: int) -> TensorEntry:
    """Some rows (axis 0) or columns (axis 1) of a tensor, in the given order.

    Args:
        columns: a slice with non-negative ends, or indices.
    """
    size = entry.shape[axis]
    # the shape without reading: numpy's own rules for a slice
    count = len(range(*columns.indices(size))) if isinstance(columns, slice) else len(columns)
    where = (slice(None),) * axis + (columns,)
    shape = entry.shape[:axis] + (count,) + entry.shape[axis + 1 :]
    return TensorEntry(entry.dtype, shape, lambda: np.ascontiguousarray(entry.read()[where]), origin=entry.origin)


def flat_slice(entry: TensorEntry, start: int, stop: int, length: int) -> TensorEntry:
    """Some of a tensor's numbers in their flat order, [length]: those from `start` to `stop`, and zeros after them.

    Of a mapped file nothing else is read.
    """

    def read() -> np.ndarray:
        part = np.zeros(length, dtype=NUMPY_TYPES[entry.dtype])
        if entry.turned_from is None:
            part[: stop - start] = entry.read().reshape(-1)[start:stop]
        elif start < stop:  # our rows are the file's columns: no others are turned
            width = entry.shape[1]
            first, last = start // width, -(-stop // width)
            rows = entry.turned_from.read()[:, first:last].T.reshape(-1)
            part[: stop - start] = rows[start - first * width : stop - first * width]
        return part

    return TensorEntry(entry.dtype, (length,), read, origin=entry.origin)


def selected_outputs(entry: TensorEntry, columns: np.ndarray | slice) -> TensorEntry:
    """Some outputs of a linear weight [in, out] or bias [out], as `selected`.

    Of a weight that was transposed on reading they are rows of the file, so that no others are read.
    """
    if entry.turned_from is not None:
        return transposed(selected(entry.turned_from, columns, 0))
    return selected(entry, columns, len(entry.shape) - 1)


def joined(first: TensorEntry, second: TensorEntry, axis: int) -> TensorEntry:
    """Two tensors of one dtype, concatenated along `axis`."""
    shape = list(first.shape)
    shape[axis] += second.shape[axis]
    return TensorEntry(
        first.dtype,
        tuple(shape),
        lambda: np.concatenate([first.read(), second.read()], axis=axis),
        origin=first.origin and f"{first.origin}, or {second.origin}",
    )


def converted(entry: TensorEntry, dtype: str) -> TensorEntry:
    """The same tensor in another floating-point type, rounded to nearest, ties to even; integers stay as they are.

    Args:
        dtype: "F32", "F16" or "BF16".
    """
    if entry.dtype == dtype or entry.dtype not in ("F64", "F32", "F16", "BF16"):
        return entry

    def stream() -> Iterator[np.ndarray]:
        for piece in entry.pieces():
            flat = piece.reshape(-1)
            for start in range(0, flat.size, _CHUNK):
                yield _convert(flat[start : start + _CHUNK], entry.dtype, dtype)

    return TensorEntry(
        dtype, entry.shape, lambda: convert(entry.read(), entry.dtype, dtype), stream=stream, origin=entry.origin
    )


def convert(array: np.ndarray, source: str, target: str) -> np.ndarray:
    """Values of one floating-point type as another; see `converted`.

    Raises:
        UserError: a finite number is too large for float16.
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    result = np.empty(flat.shape, dtype=NUMPY_TYPES[target])
    for start in range(0, flat.size, _CHUNK):
        result[start : start + _CHUNK] = _convert(flat[start : start + _CHUNK], source, target)
    return result.reshape(array.shape)


# bfloat16 is unknown to numpy: it is widened to float32 by a shift, and made from float32 by rounding bits.
def _convert(part: np.ndarray, source: str, target: str) -> np.ndarray:
    wide = _widened(part) if source == "BF16" else part
    return bfloat16_bits(wide.astype(np.float32)) if target == "BF16" else _cast(wide, target)


def _widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _cast(values: np.ndarray, target: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        result = values.astype(NUMPY_TYPES[target])
    # an infinity that was one before is `finite`'s to report
    lost = np.isinf(result) & np.isfinite(values)
    if lost.any():
        largest = float(values[lost][0])
        raise UserError(
            f"a weight of {largest:g} is too large for {target.replace('F', 'float')}; use bfloat16 or float32"
        )
    return result


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Float32 numbers [n] as bfloat16, uint16 [n]: rounded to nearest, ties to even; a NaN stays one."""
    raw = values.view(np.uint32)
    # adding 0x7FFF, or 0x8000 where the last kept bit is 1, carries into it exactly when the rest rounds up
    rounded = ((raw + (np.uint32(0x7FFF) + ((raw >> 16) & 1))) >> 16).astype(np.uint16)
    # a NaN whose upper bits are zero must not become infinity: the quiet bit is set
    quiet = ((raw >> 16) | 0x40).astype(np.uint16)
    return np.where(np.isnan(values), quiet, rounded)
