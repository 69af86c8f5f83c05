"""An unpickler that runs nothing: it builds what tensors are made of, and refuses any other name.

A pickle may call any function by name.  Here a name is looked up in one short table, and any other is an error that
says which.  Keys are texts, because to hash anything else a pickle can make take for ever.
"""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, ClassVar

from paddlemix.checkpoints.files.pickled_tensors import (
    STORAGES,
    FileRange,
    NumpyArray,
    NumpyType,
    Storage,
    StorageType,
    array_from_buffer,
    rebuild_tensor,
)
from paddlemix.errors import UserError

_LARGE = 4096  # bytes; larger contents stay in the file


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1" if encoding == "latin1" else "utf-8")


def _fill(target: dict[str, Any], keys: Iterable[Any], values: Iterable[Any]) -> None:
    """Adds items whose keys are texts: a tuple nested sixty times, each level twice, would never finish hashing."""
    for key, value in zip(keys, values, strict=True):
        if type(key) is not str:
            raise pickle.UnpicklingError(f"a key that is not a text but a {type(key).__name__}")
        target[key] = value


def _ordered_dict(pairs: Iterable[Any] = ()) -> collections.OrderedDict[str, Any]:
    """Stand-in for OrderedDict, which Python 2 pickled with its items as pairs."""
    result: collections.OrderedDict[str, Any] = collections.OrderedDict()
    for key, value in pairs:
        _fill(result, (key,), (value,))
    return result


# (module, name) in a pickle -> what is built in its place.  Nothing here reads, writes, imports or calls what a file
# chooses; whoever adds a line must keep that.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("builtins", "tuple"): tuple,
    ("__builtin__", "tuple"): tuple,  # the same in protocol 2
    ("_codecs", "encode"): _encode,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("numpy", "ndarray"): NumpyArray,
    ("numpy", "dtype"): NumpyType,
    **{("torch", name): StorageType(dtype) for name, dtype in STORAGES.items()},
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", NumpyArray),
            ("numeric", "_frombuffer", array_from_buffer),
        )
    },
}


_PythonUnpickler: Any = pickle._Unpickler  # unlike the one in C, its steps can be replaced


class RestrictedUnpickler(_PythonUnpickler):
    """Builds nothing but what `_ALLOWED` names, and leaves large contents in the file.

    Args:
        file: at the pickle's first byte.
        path: of the file, for messages.
        ranges: torch storages by key.
        mapped: whether `file` is `path` itself, so that a position in one is a position in the other.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(_PythonUnpickler.dispatch)

    def __init__(self, file: IO[bytes], path: Path, ranges: dict[str, FileRange], mapped: bool) -> None:
        super().__init__(file)
        # `pickle` reads through this function; see `_read` for why the size is needed
        size = os.fstat(file.fileno()).st_size if mapped else len(file.getbuffer())  # type: ignore[attr-defined]
        self._file_read = lambda count: _read(file, count, size)
        self.file, self.path, self.ranges, self.mapped = file, path, ranges, mapped
        self.storages: dict[str, tuple[str, int]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise UserError(
            f"'{self.path}' wants to use {module}.{name}, which no weight file needs: it may run code and was not "
            "read; get the weights as safetensors from a source you trust"
        )

    def persistent_load(self, saved: Any) -> Storage:
        # ("storage", type, key, device, number of elements); Source: torch/serialization.py, persistent_id
        kind, storage_type, key, _, count = saved[:5]
        if kind != "storage" or not isinstance(storage_type, StorageType):
            raise pickle.UnpicklingError("a storage of unknown kind")
        if type(key) not in (str, int) or type(count) is not int:
            raise pickle.UnpicklingError("a storage without key or length")
        self.storages[str(key)] = (storage_type.dtype, count)
        return Storage(storage_type.dtype, str(key), self.ranges)

    # BUILD calls __setstate__ or sets attributes: only our two stand-ins get a state.
    def load_build(self) -> None:
        state, built = self.stack.pop(), self.stack[-1]
        if isinstance(built, (NumpyArray, NumpyType)):
            built.__setstate__(state)
        elif not isinstance(built, collections.OrderedDict):  # ignored: torch notes versions as attributes
            raise pickle.UnpicklingError(f"a state for a {type(built).__name__}")

    # The four steps that fill a dict go through `_fill`, which refuses keys that are not texts.
    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        _fill(self.stack[-1], items[::2], items[1::2])

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._target()
        _fill(self.stack[-1], (key,), (value,))

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._target()
        _fill(self.stack[-1], items[::2], items[1::2])

    def _target(self) -> None:
        if not isinstance(self.stack[-1], dict):
            raise pickle.UnpicklingError(f"items for a {type(self.stack[-1]).__name__}")

    def load_set(self) -> None:
        raise pickle.UnpicklingError("a set")

    # Large contents are not read but become ranges of the file: possible where the pickle is the file (`mapped`) and
    # the bytes are not in a frame that was read already.
    def _content(self, length: int) -> None:
        frame = self._unframer.current_frame
        inside_frame = frame is not None and frame.tell() < len(frame.getbuffer())
        if length < _LARGE or inside_frame or not self.mapped:
            self.append(self.read(length))
            return
        here = self.file.tell()
        self.append(FileRange(self.path, here, length))
        self.file.seek(length, io.SEEK_CUR)
        if self.file.tell() > os.fstat(self.file.fileno()).st_size:
            raise EOFError

    def load_binbytes(self) -> None:
        self._content(struct.unpack("<I", self.read(4))[0])

    def load_binbytes8(self) -> None:
        self._content(struct.unpack("<Q", self.read(8))[0])

    # opcode -> step; the others are Python's own
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BINBYTES[0]] = load_binbytes
    dispatch[pickle.BINBYTES8[0]] = load_binbytes8
    dispatch[pickle.BYTEARRAY8[0]] = load_binbytes8
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch.update(dict.fromkeys((pickle.EMPTY_SET[0], pickle.ADDITEMS[0], pickle.FROZENSET[0]), load_set))


def _read(file: IO[bytes], count: int, size: int) -> bytes:
    """Bytes of a file.  For more than it has, Python would allocate the memory before it fails."""
    if count > size - file.tell():
        raise EOFError
    return file.read(count)
