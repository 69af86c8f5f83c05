"""Weight files that are pickles, read without running anything: torch's .bin and Paddle's .pdparams.

Tensors are not read but remembered as ranges of their file, so that a file of many gigabytes costs no memory.  Neither
torch nor paddle is needed.  What a pickle may name is decided in `unpickler.py`.

Source of the formats: torch/serialization.py, paddle/framework/io.py, numpy's ndarray.__reduce__.
"""

from __future__ import annotations

import errno
import io
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from paddlemix.checkpoints.files.pickled_tensors import (
    FileRange,
    NumpyArray,
    TorchTensor,
)
from paddlemix.checkpoints.files.tensors import NUMPY_TYPES, TensorEntry
from paddlemix.checkpoints.files.unpickler import RestrictedUnpickler
from paddlemix.errors import MissingFileError, UserError
from paddlemix.lfs import refuse_pointer

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_SHOWN = 200  # characters of a name or reason in an error


def read_torch(path: Path) -> dict[str, TensorEntry]:
    """Lists the tensors of a file of `torch.save`, in the zip format or the one before it.

    Raises:
        MissingFileError: no such file.
        UserError: the file is damaged, holds something else than tensors by name, or wants to run code.
    """
    # torch >= 1.6 writes a zip archive, earlier versions a series of pickles
    return _guarded(path, lambda: _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path))


def read_paddle(path: Path) -> dict[str, TensorEntry]:
    """Lists the tensors of a file of `paddle.save`; raises as `read_torch`."""

    def read() -> Any:
        with open(path, "rb") as file:
            # arrays are inside the pickle itself, so large ones are ranges of this very file
            return RestrictedUnpickler(file, path, {}, mapped=True).load()

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
        if error.errno == errno.EINVAL:  # a position that no file has: the pickle is wrong about its lengths
            raise _damaged(path, error) from error
        raise MissingFileError(f"weight file '{path}' cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle fails in any way; none is a defect of ours
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"'{path}' is damaged or cut short ({repr(error)[:_SHOWN]}); copy it again")


def _tensors(content: Any, path: Path) -> dict[str, TensorEntry]:
    """The named tensors of an unpickled file."""
    if not isinstance(content, dict):
        raise UserError(f"'{path}' does not hold tensors by name but a {type(content).__name__}")
    # Source: Paddle's _unpack_saved_dict, which slices arrays above 4 GB for protocol 2
    if "UnpackBigParamInfor@@" in content:
        raise UserError(f"'{path}' has its large tensors in slices (pickle protocol 2); save it again with protocol 4")
    tensors = {}
    for name, value in content.items():
        if name == "StructuredToParameterName@@":  # Paddle's table of names, not a weight
            continue
        if isinstance(value, tuple) and len(value) == 2:  # how Paddle pickles a tensor: (its own name, array)
            value = value[1]
        if not isinstance(value, (TorchTensor, NumpyArray)):
            raise UserError(f"'{path}': '{name[:_SHOWN]}' is not a tensor but a {type(value).__name__}")
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
        # Stored, not compressed, so that reading one takes no more memory than the file has bytes.
        with open(path, "rb") as file:
            for name in {pickled[0], f"{root}byteorder"}.intersection(names):
                _stored_range(file, path, archive.getinfo(name))
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise UserError(f"'{path}' was written on a big-endian machine, which is not supported; save it again")
        infos = {info.filename.removeprefix(f"{root}data/"): info for info in archive.infolist()}
        with open(path, "rb") as file:
            ranges = {key: _stored_range(file, path, info) for key, info in infos.items() if not info.is_dir()}
        return RestrictedUnpickler(io.BytesIO(archive.read(pickled[0])), path, ranges, mapped=False).load()


def _stored_range(file: IO[bytes], path: Path, info: zipfile.ZipInfo) -> FileRange:
    """Where a member's bytes are: after its local header, whose lengths may differ from those in the directory."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise UserError(
            f"'{path}' is a compressed archive; torch.save does not compress, unpack and zip it with 'zip -0'"
        )
    # local header: 26 bytes, two lengths of 2 bytes each, then name and extra field of these lengths
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

        def load() -> tuple[Any, RestrictedUnpickler]:
            unpickler = RestrictedUnpickler(file, path, ranges, mapped=True)
            return unpickler.load(), unpickler

        if load()[0] != _LEGACY_MAGIC:
            raise UserError(f"'{path}' is not a file of torch.save")
        load(), load()  # protocol version; sizes of C types
        content, unpickler = load()
        # The storages follow the pickles in the order of this list; the tensors above name them by key.
        for key in load()[0]:
            dtype, expected = unpickler.storages[str(key)]
            count = struct.unpack("<q", file.read(8))[0]
            length = count * np.dtype(NUMPY_TYPES[dtype]).itemsize
            if count != expected:
                raise UserError(f"'{path}' is damaged: storage {key} has {count} numbers, expected {expected}")
            ranges[str(key)] = FileRange(path, file.tell(), length)
            file.seek(length, io.SEEK_CUR)
    return content
