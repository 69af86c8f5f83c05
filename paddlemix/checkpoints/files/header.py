"""The header of a safetensors file: which tensors it lists, each checked, and where their bytes are.

Reads no tensor.  The rules of the format are enforced, because a header that breaks them can assign one tensor's
numbers to another: every byte after the header belongs to exactly one tensor, and no name occurs twice.

Source: https://huggingface.co/docs/safetensors, and `Metadata::validate` in safetensors/src/tensor.rs.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paddlemix.checkpoints.files.tensors import NUMPY_TYPES, count_bytes, is_shape
from paddlemix.errors import MissingFileError, UserError
from paddlemix.json_files import parse_json
from paddlemix.lfs import refuse_pointer

_MAX_BYTES = 100 * 1024 * 1024  # Source: MAX_HEADER_SIZE of the safetensors library
_MAX_TENSORS = 250_000  # of a file; the largest mixtures of experts have a tenth of it
_SHOWN = 200  # characters of a name or reason in an error


@dataclass(frozen=True)
class TensorRange:
    """Where a tensor's bytes are.

    Args:
        dtype: a key of `NUMPY_TYPES`.
        begin, end: bytes after the header.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file declares.

    Args:
        start: first byte after the header.
        tensors: by name, in the header's order.
        metadata: texts by name.
    """

    start: int
    tensors: dict[str, TensorRange]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Reads and checks a file's header.

    Raises:
        MissingFileError: no such file, or it cannot be read.
        UserError: it is cut short or damaged, is not safetensors, or holds a type that is not supported.
    """
    if not path.is_file():
        raise MissingFileError(f"weight file '{path}' does not exist")
    refuse_pointer(path, f"weight file '{path}'")
    encoded, size = _read(path)
    length = len(encoded)
    try:
        values = parse_json(encoded.decode())
        metadata = _texts(values)
        tensors = {name: _tensor(name, item) for name, item in values.items()}
        _check_places(tensors.items(), size - 8 - length)
    except (json.JSONDecodeError, UnicodeError, UserError, _Damaged) as error:
        reason = str(error)[:_SHOWN]
        raise UserError(f"'{path}' has a damaged safetensors header ({reason}); copy it again") from error
    except _CutShort as error:
        promised = 8 + length + error.end
        raise UserError(
            f"'{path}' is cut short: {size} bytes, its header promises {promised}; copy it again"
        ) from error
    unknown = sorted({item.dtype for item in tensors.values()} - NUMPY_TYPES.keys())
    if unknown:
        allowed = ", ".join(NUMPY_TYPES)
        raise UserError(f"'{path}' holds a tensor of type {unknown[0][:_SHOWN]}; allowed: {allowed}")
    return Header(8 + length, tensors, metadata)


def _read(path: Path) -> tuple[bytes, int]:
    """The bytes of a header, and the size of its file.

    Raises:
        MissingFileError: the file cannot be read.
        UserError: it has no such header.
    """
    # 8 bytes, little-endian: the length of the header; then the header, JSON in UTF-8
    try:
        with open(path, "rb") as file:
            size, prefix = os.fstat(file.fileno()).st_size, file.read(8)
            # a file of less than 8 bytes is refused below like one whose length is impossible
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_BYTES + 1
            if length > min(_MAX_BYTES, size - 8):
                raise UserError(f"'{path}' is not a safetensors file or is cut short ({size} bytes); copy it again")
            return file.read(length), size
    except OSError as error:
        raise MissingFileError(f"weight file '{path}' cannot be read: {error.strerror or error}") from error


class _Damaged(Exception):
    """What is wrong, in words."""


class _CutShort(Exception):
    """The file ends before `end`, a byte after the header."""

    def __init__(self, end: int) -> None:
        super().__init__(end)
        self.end = end


def _texts(values: Any) -> dict[str, str]:
    """Removes the metadata from a header and returns it."""
    if not isinstance(values, dict) or len(values) > _MAX_TENSORS:
        raise _Damaged(f"it is not an object of at most {_MAX_TENSORS:,} tensors")
    metadata = values.pop("__metadata__", None)
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Damaged("its __metadata__ is not an object of texts")
    return metadata


def _tensor(name: str, item: Any) -> TensorRange:
    shown = name[:_SHOWN]
    name.encode()  # half a surrogate, which nothing could write again, raises UnicodeEncodeError
    if not isinstance(item, dict) or not isinstance(item.get("dtype"), str) or not is_shape(item.get("shape")):
        raise _Damaged(f"'{shown}' has no dtype or no shape")
    # `type(...) is int`, not isinstance: true and false are ints too
    offsets = item.get("data_offsets")
    if not isinstance(offsets, list) or [type(offset) for offset in offsets] != [int, int]:
        raise _Damaged(f"the data_offsets of '{shown}' are not two whole numbers")
    found = TensorRange(item["dtype"], tuple(item["shape"]), *offsets)
    if found.dtype in NUMPY_TYPES and found.end - found.begin != count_bytes(found.dtype, found.shape):
        raise _Damaged(f"'{shown}' has bytes {found.begin} to {found.end} for {found.dtype} {list(found.shape)}")
    return found


def _check_places(tensors: Iterable[tuple[str, TensorRange]], size: int) -> None:
    """Each of `size` bytes belongs to one tensor."""
    # In the order of their places each must begin where the last one ended; empty tensors share a place.
    ranges = sorted((item.begin, item.end, name) for name, item in tensors)
    end = max((end for _, end, _ in ranges), default=0)
    if end > size:  # checked first: a download that broke off is the likeliest cause
        raise _CutShort(end)
    place = 0
    for begin, end, name in ranges:
        if begin != place or end < begin:
            what = "overlap another tensor's" if begin < place else "follow bytes of no tensor"
            raise _Damaged(f"bytes {begin} to {end} of '{name[:_SHOWN]}' {what}")
        place = end
    if place != size:
        raise _Damaged(f"{size - place} bytes after the last tensor belong to none")
