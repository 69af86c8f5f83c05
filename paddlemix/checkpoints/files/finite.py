"""NaN and infinity in a tensor, detected while it is being read anyway.

A weight that is not a number makes every answer nonsense without an error, so none is loaded, converted or saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from paddlemix.checkpoints.files.tensors import TensorEntry, Tensors
from paddlemix.errors import UserError

_CHUNK = 1 << 18  # elements that are checked at once: they are still in the processor's cache
# Type -> the same bits as a signed and as an unsigned integer, and the least of each whose exponent is all ones.
# NaN and infinity are the largest there: positive ones of the signed integers, negative ones of the unsigned.
_BITS: dict[str, tuple[type[np.signedinteger], int, type[np.unsignedinteger], int]] = {
    "F64": (np.int64, 0x7FF0_0000_0000_0000, np.uint64, 0xFFF0_0000_0000_0000),
    "F32": (np.int32, 0x7F80_0000, np.uint32, 0xFF80_0000),
    "F16": (np.int16, 0x7C00, np.uint16, 0xFC00),
    "BF16": (np.int16, 0x7F80, np.uint16, 0xFF80),
}


class NotFiniteError(UserError):
    """A tensor holds NaN or infinity.

    Args:
        tensor: which one, and where it is from.
        found: "NaN" or "infinity".
        place: flat index of the first.
    """

    def __init__(self, tensor: str, found: str, place: int) -> None:
        super().__init__(
            f"{tensor} holds {found} (first at element {place:,}), so that no output would be a number; copy the file "
            "again, or take an earlier checkpoint if the training that wrote it diverged"
        )
        self.tensor, self.found, self._place = tensor, found, place

    def __reduce__(self) -> tuple[type[NotFiniteError], tuple[str, str, int]]:
        return NotFiniteError, (self.tensor, self.found, self._place)  # other processes of a run raise it too


def is_finite(values: np.ndarray, dtype: str) -> bool:
    """Whether all numbers of a contiguous array are finite.

    Args:
        dtype: as safetensors names it; integers are finite.
    """
    if dtype not in _BITS or not values.size:
        return True
    signed, positive, unsigned, negative = _BITS[dtype]
    flat = values.reshape(-1)
    # two maxima over integers: BF16 has no floating type in numpy, and np.isfinite would allocate an array of booleans
    return bool(flat.view(signed).max() < positive and flat.view(unsigned).max() < negative)


def finite(entry: TensorEntry, name: str) -> TensorEntry:
    """The same tensor, whose numbers are checked as they are read.

    Args:
        name: of the tensor in errors, where it has no `origin`.

    Returns:
        A tensor that raises `NotFiniteError` where a number is NaN or infinite.
    """
    if entry.dtype not in _BITS:  # integers
        return entry
    title = entry.origin or name

    def stream() -> Iterator[np.ndarray]:
        start = 0
        for piece in entry.pieces():
            flat = piece.reshape(-1)
            for begin in range(0, flat.size, _CHUNK):
                chunk = flat[begin : begin + _CHUNK]
                _check(chunk, entry.dtype, title, start + begin)
                yield chunk
            start += flat.size

    def read() -> np.ndarray:
        array = entry.read()
        flat = np.ascontiguousarray(array).reshape(-1)
        for begin in range(0, flat.size, _CHUNK):
            _check(flat[begin : begin + _CHUNK], entry.dtype, title, begin)
        return array

    # The matrix that this one is the transpose of is another way to the same numbers: it is checked too.
    turned_from = None if entry.turned_from is None else finite(replace(entry.turned_from, origin=title), title)
    return TensorEntry(entry.dtype, entry.shape, read, turned_from=turned_from, stream=stream, origin=entry.origin)


def all_finite(tensors: Tensors) -> dict[str, TensorEntry]:
    """Tensors by name, whose numbers are checked as they are read; see `finite`."""
    return {name: finite(entry, f"'{name}'") for name, entry in tensors.items()}


def _check(values: np.ndarray, dtype: str, title: str, start: int) -> None:
    if is_finite(values, dtype):
        return
    # only now, in the chunk that holds one, which number it is and where
    numbers = (values.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else values
    place = int(np.flatnonzero(~np.isfinite(numbers))[0])
    raise NotFiniteError(title, "NaN" if np.isnan(numbers[place]) else "infinity", start + place)
