"""Weight files that are pickles, read without running anything: torch's .bin and Paddle's .pdparams.

A pickle may call any function by name.  Here a name is looked up in one short table of what tensors are built of, and
any other is an error that says which.  Keys are texts, because to hash anything else a pickle can make take for ever.
Tensors are not read but remembered as ranges of their file, so that a file of many gigabytes costs no memory.  Neither
torch nor paddle is needed.

Source of the formats: torch/serialization.py, paddle/framework/io.py, numpy's ndarray.__reduce__.
"""

from __future__ import annotations

import collections
import errno
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np

from paddlemix.checkpoints.files.pickled_tensors import (
    STORAGES,
    FileRange,
    NumpyArray,
    NumpyType,
    Storage,
    StorageType,
    TorchTensor,
    array_from_buffer,
    rebuild_tensor,
)
from paddlemix.checkpoints.files.tensors import NUMPY_TYPES, TensorEntry
from paddlemix.errors import MissingFileError, UserError
from paddlemix.lfs import refuse_pointer

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LARGE = 4096  # bytes; larger contents stay in the file
_SHOWN = 200  # characters of a name or reason in an error


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1" if encoding == "latin1" else "utf-8")


def _fill(target: dict[str, Any], keys: Iterable[Any], values: Iterable[Any]) -> None:
    """Adds items.  A tuple that holds a tuple twice, and so on sixty times, is quickly made and never hashed."""
    for key, value in zip(keys, values, strict=True):
        if type(key) is not str:
            raise pickle.UnpicklingError(f"a key that is not a text but a {type(key).__name__}")
        target[key] = value


def _ordered_dict(pairs: Iterable[Any] = ()) -> collections.OrderedDict[str, Any]:
    """Stands for OrderedDict, which Python 2 pickled with its items as pairs."""
    result: collections.OrderedDict[str, Any] = collections.OrderedDict()
    for key, value in pairs:
        _fill(result, (key,), (value,))
    return result


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


_PythonUnpickler: Any = pickle._Unpickler  # its steps can be replaced


class _Unpickler(_PythonUnpickler):
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
        kind, storage_type, key, _, count = saved[:5]
        if kind != "storage" or not isinstance(storage_type, StorageType):
            raise pickle.UnpicklingError("a storage of unknown kind")
        if type(key) not in (str, int) or type(count) is not int:
            raise pickle.UnpicklingError("a storage without key or length")
        self.storages[str(key)] = (storage_type.dtype, count)
        return Storage(storage_type.dtype, str(key), self.ranges)

    def load_build(self) -> None:
        state, built = self.stack.pop(), self.stack[-1]
        if isinstance(built, (NumpyArray, NumpyType)):
            built.__setstate__(state)
        elif not isinstance(built, collections.OrderedDict):  # its attributes are torch's notes on versions
            raise pickle.UnpicklingError(f"a state for a {type(built).__name__}")

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

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BINBYTES[0]] = load_binbytes
    dispatch[pickle.BINBYTES8[0]] = load_binbytes8
    dispatch[pickle.BYTEARRAY8[0]] = load_binbytes8
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch.update(dict.fromkeys((pickle.EMPTY_SET[0], pickle.ADDITEMS[0], pickle.FROZENSET[0]), load_set))


def _read(file: IO[bytes], count: int, size: int) -> bytes:
    """Bytes of a file; asked for more than it has, Python would make room for them first."""
    if count > size - file.tell():
        raise EOFError
    return file.read(count)


def read_torch(path: Path) -> dict[str, TensorEntry]:
    """Lists the tensors of a file of `torch.save`, in the zip format or the one before it.

    Raises:
        MissingFileError: no such file.
        UserError: the file is damaged, holds something else than tensors by name, or wants to run code.
    """
    return _guarded(path, lambda: _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path))


def read_paddle(path: Path) -> dict[str, TensorEntry]:
    """Lists the tensors of a file of `paddle.save`; raises as `read_torch`."""

    def read() -> Any:
        with open(path, "rb") as file:
            return _Unpickler(file, path, {}, mapped=True).load()

    return _guarded(path, read)


def _guarded(path: Path, read: Callable[[], Any]) -> dict[str, TensorEntry]:
    if not path.is_file():
        raise MissingFileError(f"weight file '{path}' does not exist")
    refuse_pointer(path, f"weight file '{path}'")
    try:
        return _tensors(read(), path)
    except UserError:
        raise
    except OSError as error:
        if error.errno == errno.EINVAL:  # a place that no file has, so the pickle lies about its lengths
            raise _damaged(path, error) from error
        raise MissingFileError(f"weight file '{path}' cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle fails in any way; none of them is a defect of ours
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"'{path}' is damaged or cut short ({repr(error)[:_SHOWN]}); copy it again")


def _tensors(content: Any, path: Path) -> dict[str, TensorEntry]:
    """The named tensors of an unpickled file."""
    if not isinstance(content, dict):
        raise UserError(f"'{path}' holds no tensors by name, but a {type(content).__name__}")
    if "UnpackBigParamInfor@@" in content:
        raise UserError(f"'{path}' has its large tensors in slices (pickle protocol 2); save it again with protocol 4")
    tensors = {}
    for name, value in content.items():
        if name == "StructuredToParameterName@@":
            continue
        if isinstance(value, tuple) and len(value) == 2:  # how Paddle pickles a tensor: (its own name, array)
            value = value[1]
        if not isinstance(value, (TorchTensor, NumpyArray)):
            raise UserError(f"'{path}': '{name[:_SHOWN]}' is no tensor, but a {type(value).__name__}")
        try:
            tensors[name] = value.entry()
        except UserError as error:
            raise UserError(f"'{path}': '{name[:_SHOWN]}': {error}") from error
    return tensors


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickled = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
        if len(pickled) != 1:
            raise UserError(f"'{path}' is a zip archive, but not one of torch.save")
        root = pickled[0].removesuffix("data.pkl")
        with open(path, "rb") as file:  # stored, so that none is larger than the file
            for name in {pickled[0], f"{root}byteorder"}.intersection(names):
                _stored_range(file, path, archive.getinfo(name))
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise UserError(f"'{path}' was written on a big-endian machine, which is not supported; save it again")
        infos = {info.filename.removeprefix(f"{root}data/"): info for info in archive.infolist()}
        with open(path, "rb") as file:
            ranges = {key: _stored_range(file, path, info) for key, info in infos.items() if not info.is_dir()}
        return _Unpickler(io.BytesIO(archive.read(pickled[0])), path, ranges, mapped=False).load()


def _stored_range(file: IO[bytes], path: Path, info: zipfile.ZipInfo) -> FileRange:
    """Where a member's bytes are: behind its local header, whose lengths may differ from the directory's."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise UserError(
            f"'{path}' is a compressed archive; torch.save does not compress, unpack and zip it with 'zip -0'"
        )
    file.seek(info.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", file.read(4))
    start = info.header_offset + 30 + name_length + extra_length
    if start + info.file_size > os.fstat(file.fileno()).st_size:
        raise EOFError
    return FileRange(path, start, info.file_size)


def _read_legacy(path: Path) -> Any:
    """The format before torch 1.6: five pickles, then each storage as its length and its numbers."""
    ranges: dict[str, FileRange] = {}
    with open(path, "rb") as file:

        def load() -> tuple[Any, _Unpickler]:
            unpickler = _Unpickler(file, path, ranges, mapped=True)
            return unpickler.load(), unpickler

        if load()[0] != _LEGACY_MAGIC:
            raise UserError(f"'{path}' is not a file of torch.save")
        load(), load()  # protocol version; sizes of C types
        content, unpickler = load()
        for key in load()[0]:
            dtype, expected = unpickler.storages[str(key)]
            count = struct.unpack("<q", file.read(8))[0]
            length = count * np.dtype(NUMPY_TYPES[dtype]).itemsize
            if count != expected:
                raise UserError(f"'{path}' is damaged: storage {key} has {count} numbers, expected {expected}")
            ranges[str(key)] = FileRange(path, file.tell(), length)
            file.seek(length, io.SEEK_CUR)
    return content
