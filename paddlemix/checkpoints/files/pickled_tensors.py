"""What a pickled tensor is built from, as stand-ins that read nothing until they must.

Source of the states: numpy's ndarray.__reduce__, torch/_utils.py.
"""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paddlemix.checkpoints.files.tensors import NUMPY_TYPES, TensorEntry, is_shape
from paddlemix.errors import UserError

STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
# numpy's short names; Paddle keeps bfloat16 in unsigned integers of the same width
_NUMPY_CODES = {"f8": "F64", "f4": "F32", "f2": "F16", "u2": "BF16", "i8": "I64", "i4": "I32", "i2": "I16"}
_NUMPY_CODES |= {"i1": "I8", "u1": "U8", "b1": "BOOL"}


@dataclass(frozen=True)
class FileRange:
    """Bytes of a file, not read."""

    path: Path
    offset: int
    length: int

    def check(self, dtype: str, count: int, start: int = 0) -> None:
        """Checks that the range has room for `count` numbers from number `start` on.

        Raises:
            UserError: it has not.
        """
        end = (start + count) * np.dtype(NUMPY_TYPES[dtype]).itemsize
        if start < 0 or end > self.length:
            raise UserError(f"it is damaged: a tensor needs {end} bytes of {self.length}; copy it again")

    def array(self, dtype: str, count: int, start: int = 0) -> np.ndarray:
        """`count` numbers from number `start` on, memory-mapped.

        Raises:
            UserError: the file has become shorter.
        """
        kind = np.dtype(NUMPY_TYPES[dtype])
        if not count:
            return np.zeros(0, dtype=kind)
        offset = self.offset + start * kind.itemsize
        # checked again: a mapping beyond the end of a file kills the process with SIGBUS
        if self.path.stat().st_size < offset + count * kind.itemsize:
            raise UserError(f"'{self.path}' is cut short; copy it again")
        return np.memmap(self.path, dtype=kind, mode="r", offset=offset, shape=(count,))


@dataclass(frozen=True)
class Storage:
    """Where the numbers of torch tensors are, by key of `ranges`, which the legacy format fills after the pickle."""

    dtype: str
    key: str
    ranges: dict[str, FileRange]


class StorageType:
    """Stand-in for `torch.FloatStorage` and the like."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype


@dataclass(frozen=True)
class TorchTensor:
    storage: Storage
    offset: int  # numbers, not bytes; strides too
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def entry(self) -> TensorEntry:
        """The tensor, unread.

        Raises:
            UserError: shape, strides and storage do not fit together.
        """
        storage, used = self.storage, self._used()
        if used and storage.key not in storage.ranges:
            raise UserError(f"it is damaged: the storage {storage.key[:60]} is missing; copy it again")
        if used:
            storage.ranges[storage.key].check(storage.dtype, used, self.offset)
        return TensorEntry(storage.dtype, self.shape, lambda: self._read(used))

    def _used(self) -> int:
        """Numbers of the storage from the first that the tensor uses to the last."""
        if len(self.strides) != len(self.shape) or any(stride < 0 for stride in self.strides) or self.offset < 0:
            raise UserError(f"it is damaged: strides {self.strides}; copy it again")
        if 0 in self.shape:
            return 0
        used = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        # more numbers than places: an expanded tensor, whose shape may ask for any amount of memory
        if math.prod(self.shape) > used:
            raise UserError(
                f"shape {self.shape} and strides {self.strides} use numbers more than once, which no weight does; "
                "save its .contiguous()"
            )
        return used

    def _read(self, used: int) -> np.ndarray:
        storage = self.storage
        if not used:
            return np.zeros(self.shape, dtype=NUMPY_TYPES[storage.dtype])
        flat = storage.ranges[storage.key].array(storage.dtype, used, self.offset)
        steps = [stride * flat.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False)


class NumpyType:
    """Stand-in for a numpy dtype, which accepts the same pickled state."""

    def __init__(self, code: str, *_: Any) -> None:
        # "f4", "<f4", "|b1": byte order and kind; what follows in the pickle is of no use here
        if type(code) is not str:
            raise pickle.UnpicklingError("a type without name")
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if type(state[1]) is not str:
            raise pickle.UnpicklingError("a type without byte order")
        self.order = state[1]  # state[0] is numpy's version of the format

    def name(self) -> str:
        code = self.code.lstrip("<|=")
        if code not in _NUMPY_CODES or self.order == ">":
            raise UserError(
                f"a pickled array has the type '{self.order[:1]}{self.code[:20]}'; allowed: {', '.join(_NUMPY_CODES)}"
            )
        return _NUMPY_CODES[code]


class NumpyArray:
    """Stand-in for a numpy array, which accepts the same pickled state."""

    def __init__(self, *_: Any) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def entry(self) -> TensorEntry:
        """The tensor, unread.

        Raises:
            UserError: its type is not one of a weight, or it is damaged.
        """
        # version, shape, dtype, Fortran order, bytes; Source: numpy array_setstate
        _, shape, kind, fortran, content = self.state
        dtype, count = kind.name(), math.prod(_checked(shape))
        if isinstance(content, FileRange):
            content.check(dtype, count)
        elif not isinstance(content, bytes) or len(content) < count * np.dtype(NUMPY_TYPES[dtype]).itemsize:
            raise UserError("it is damaged: the array's content is too short; copy it again")

        def read() -> np.ndarray:
            if isinstance(content, FileRange):
                flat = content.array(dtype, count)
            else:
                flat = np.frombuffer(content, dtype=NUMPY_TYPES[dtype], count=count)
            # column by column in the file: the reversed shape, transposed, without a copy
            return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)

        return TensorEntry(dtype, shape, read)


def _checked(shape: Any) -> tuple[int, ...]:
    """A shape, or strides, which obey the same rules, as a tuple."""
    if not is_shape(shape):
        raise UserError("it is damaged: its shape is not one; copy it again")
    return tuple(shape)


def array_from_buffer(content: Any, kind: NumpyType, shape: Any, order: str) -> NumpyArray:
    array = NumpyArray()
    array.__setstate__((1, shape, kind, order == "F", content))
    return array


def rebuild_tensor(storage: Storage, offset: int, shape: Any, strides: Any, *_: Any) -> TorchTensor:
    # a pickle may pass anything: each argument is checked before it is used as a size
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("a tensor without storage")
    if type(offset) is not int:
        raise pickle.UnpicklingError("a tensor without place in its storage")
    return TorchTensor(storage, offset, _checked(shape), _checked(strides))
