"""Weight files that are pickles, read without running anything: torch's .bin and Paddle's .pdparams.

A pickle may call any function by name.  Here a name is looked up in one short table of what tensors are built of, and
any other is an error that says which.  Tensors are not read but remembered as ranges of their file, so that a file of
many gigabytes costs no memory.  Neither torch nor paddle is needed.

Source of the formats: torch/serialization.py, paddle/framework/io.py, numpy's ndarray.__reduce__.
"""

from __future__ import annotations

import collections
import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np

from paddlemix.checkpoints.pickled_tensors import (
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
from paddlemix.checkpoints.tensors import NUMPY_TYPES, TensorEntry
from paddlemix.errors import MissingFileError, UserError
from paddlemix.lfs import refuse_pointer

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LARGE = 4096  # bytes; larger contents stay in the file


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1" if encoding == "latin1" else "utf-8")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
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
            raise pickle.UnpicklingError(f"a storage of unknown kind {kind!r}")
        self.storages[str(key)] = (storage_type.dtype, int(count))
        return Storage(storage_type.dtype, str(key), self.ranges)

    def load_build(self) -> None:
        state, built = self.stack.pop(), self.stack[-1]
        if isinstance(built, (NumpyArray, NumpyType)):
            built.__setstate__(state)
        elif not isinstance(built, collections.OrderedDict):  # its attributes are torch's notes on versions
            raise pickle.UnpicklingError(f"a state for a {type(built).__name__}")

    def _content(self, length: int) -> None:
        frame = self._unframer.current_frame
        inside_frame = frame is not None and frame.tell() < len(frame.getbuffer())
        if length < _LARGE or inside_frame or not self.mapped:
            self.append(self.read(length))
            return
        here = self.file.tell()
        self.append(FileRange(self.path, here, length))
        self.file.seek(length, io.SEEK_CUR)
        if self.file.tell() > self.path.stat().st_size:
            raise EOFError

    def load_binbytes(self) -> None:
        self._content(struct.unpack("<I", self.read(4))[0])

    def load_binbytes8(self) -> None:
        self._content(struct.unpack("<Q", self.read(8))[0])

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BINBYTES[0]] = load_binbytes
    dispatch[pickle.BINBYTES8[0]] = load_binbytes8
    dispatch[pickle.BYTEARRAY8[0]] = load_binbytes8


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
    except Exception as error:  # a damaged pickle fails in any way; none of them is a defect of ours
        raise UserError(f"'{path}' is damaged or cut short ({error!r}); copy it again") from error


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
            raise UserError(f"'{path}': '{name}' is no tensor, but a {type(value).__name__}")
        tensors[str(name)] = value.entry()
    return tensors


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickled = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
        if len(pickled) != 1:
            raise UserError(f"'{path}' is a zip archive, but not one of torch.save")
        root = pickled[0].removesuffix("data.pkl")
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
    return FileRange(path, info.header_offset + 30 + name_length + extra_length, info.file_size)


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
