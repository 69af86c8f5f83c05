"""What a pickled tensor is built of, as stand-ins that read nothing until they are asked to.

Source of the states: numpy's ndarray.__reduce__, torch/_utils.py.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paddlemix.checkpoints.tensors import NUMPY_TYPES, TensorEntry
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

    def array(self, dtype: str, count: int, start: int = 0) -> np.ndarray:
        kind = np.dtype(NUMPY_TYPES[dtype])
        end = (start + count) * kind.itemsize
        if start < 0 or end > self.length:
            raise UserError(f"'{self.path}' is damaged: a tensor needs {end} bytes of {self.length}; copy it again")
        if not count:
            return np.zeros(0, dtype=kind)
        offset = self.offset + start * kind.itemsize
        if self.path.stat().st_size < offset + count * kind.itemsize:
            raise UserError(f"'{self.path}' is cut short; copy it again")
        return np.memmap(self.path, dtype=kind, mode="r", offset=offset, shape=(count,))


@dataclass(frozen=True)
class Storage:
    """Where the numbers of torch tensors are: a range that is known at once, or after the pickle (`ranges`)."""

    dtype: str
    key: str
    ranges: dict[str, FileRange]


class StorageType:
    """Stands for `torch.FloatStorage` and its like."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype


@dataclass(frozen=True)
class TorchTensor:
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def entry(self) -> TensorEntry:
        return TensorEntry(self.storage.dtype, self.shape, self.read)

    def read(self) -> np.ndarray:
        storage = self.storage
        if 0 in self.shape:
            return np.zeros(self.shape, dtype=NUMPY_TYPES[storage.dtype])
        if any(stride < 0 for stride in self.strides) or len(self.strides) != len(self.shape):
            raise UserError(f"'{storage.ranges[storage.key].path}' is damaged: strides {self.strides}; copy it again")
        used = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        flat = storage.ranges[storage.key].array(storage.dtype, used, self.offset)
        steps = [stride * flat.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False)


class NumpyType:
    """Stands for a numpy dtype; takes its state as one."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.order = str(code), "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def name(self) -> str:
        code = self.code.lstrip("<|=")
        if code not in _NUMPY_CODES or self.order == ">":
            raise UserError(
                f"a pickled array has the type '{self.order}{self.code}'; allowed: {', '.join(_NUMPY_CODES)}"
            )
        return _NUMPY_CODES[code]


class NumpyArray:
    """Stands for a numpy array; takes its state as one."""

    def __init__(self, *_: Any) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def entry(self) -> TensorEntry:
        _, shape, kind, fortran, content = self.state
        dtype, shape = kind.name(), tuple(int(size) for size in shape)

        def read() -> np.ndarray:
            count = int(np.prod(shape, dtype=np.int64))
            if isinstance(content, FileRange):
                flat = content.array(dtype, count)
            else:
                flat = np.frombuffer(bytes(content), dtype=NUMPY_TYPES[dtype], count=count)
            return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)

        return TensorEntry(dtype, shape, read)


def array_from_buffer(content: Any, kind: NumpyType, shape: Any, order: str) -> NumpyArray:
    array = NumpyArray()
    array.__setstate__((1, shape, kind, order == "F", content))
    return array


def rebuild_tensor(storage: Storage, offset: int, shape: Any, strides: Any, *_: Any) -> TorchTensor:
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("a tensor without storage")
    return TorchTensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))
