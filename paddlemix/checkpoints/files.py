"""Weight files on disk, tensor by tensor, and directories that appear whole or not at all.

Reads safetensors through a memory map and writes them in one streaming pass, so that the memory needed is that of one
tensor.  A bfloat16 tensor is a numpy uint16 array here, as it is for paddle.  Knows no weight's meaning.

Source of the format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paddlemix.errors import MissingFileError, UserError

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
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
_MAX_HEADER_BYTES = 100 * 1024 * 1024


@dataclass(frozen=True)
class TensorEntry:
    """A tensor that has not been read yet.

    Args:
        dtype: as safetensors names it, e.g. "F16", "BF16".
        shape: its shape.
        read: reads it into a numpy array of that shape; bfloat16 as uint16.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(NUMPY_TYPES[self.dtype]).itemsize


Tensors = Mapping[str, TensorEntry]


def array_entry(array: np.ndarray, dtype: str | None = None) -> TensorEntry:
    """Wraps an array that is in memory; `dtype` only where numpy's type does not tell, i.e. "BF16" for uint16."""
    names = {np.dtype(kind): name for name, kind in NUMPY_TYPES.items()}
    return TensorEntry(dtype or names[array.dtype], tuple(array.shape), lambda: array)


def read_safetensors(path: Path) -> dict[str, TensorEntry]:
    """Lists the tensors of a file without reading them.

    Raises:
        MissingFileError: no such file.
        UserError: the file is cut short or is not safetensors.
    """
    if not path.is_file():
        raise MissingFileError(f"weight file '{path}' does not exist")
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER_BYTES + 1
        if length > min(_MAX_HEADER_BYTES, size - 8):
            raise UserError(f"'{path}' is not a safetensors file or is cut short ({size} bytes); copy it again")
        encoded = file.read(length)
    try:
        header = json.loads(encoded)
        header.pop("__metadata__", None)
        end = 8 + length + max((item["data_offsets"][1] for item in header.values()), default=0)
        if end > size:
            raise UserError(f"'{path}' is cut short: {size} bytes, its header promises {end}; copy it again")
        return {name: _mapped_entry(path, 8 + length, item) for name, item in header.items()}
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"'{path}' has a damaged safetensors header ({error!r}); copy it again") from error


def _mapped_entry(path: Path, start: int, item: Mapping[str, Any]) -> TensorEntry:
    dtype, shape = item["dtype"], tuple(item["shape"])
    if dtype not in NUMPY_TYPES:
        raise UserError(f"'{path}' holds a tensor of type {dtype}; allowed: {', '.join(NUMPY_TYPES)}")
    begin, end = item["data_offsets"]
    offset = start + begin

    def read() -> np.ndarray:
        if 0 in shape:
            return np.zeros(shape, dtype=NUMPY_TYPES[dtype])
        return np.memmap(path, dtype=NUMPY_TYPES[dtype], mode="r", offset=offset, shape=shape)

    entry = TensorEntry(dtype, shape, read)
    if begin < 0 or end - begin != entry.num_bytes:
        raise ValueError(f"bytes {begin} to {end} for {dtype} {list(shape)}")
    return entry


def read_weights(directory: Path) -> dict[str, TensorEntry]:
    """Lists the tensors of a checkpoint directory: `model.safetensors`, or the shards that its index names.

    Raises:
        MissingFileError: neither is there, or the index names a shard that is missing.
        UserError: a file is damaged, or a tensor that the index promises is in no shard.
    """
    index_path = directory / INDEX_FILE
    if not index_path.is_file():
        if not (directory / SINGLE_FILE).is_file():
            raise MissingFileError(f"no weights in {directory}: expected {SINGLE_FILE} or {INDEX_FILE}")
        return read_safetensors(directory / SINGLE_FILE)
    try:
        weight_map = dict(json.loads(index_path.read_text(encoding="utf-8"))["weight_map"])
        names = sorted({str(shard) for shard in weight_map.values()})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{index_path}' is not a weight index: {error!r}; copy it again") from error
    shards: dict[str, dict[str, TensorEntry]] = {}
    for shard in names:
        if not (directory / shard).is_file():
            raise MissingFileError(f"{index_path} names the shard '{shard}', which is missing; copy it again")
        shards[shard] = read_safetensors(directory / shard)
    lost = [name for name, shard in weight_map.items() if name not in shards[shard]]
    if lost:
        raise UserError(f"{index_path} promises {len(lost)} tensors that no shard holds, e.g. '{lost[0]}'")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def write_safetensors(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a file tensor by tensor; each is read when its turn comes and let go afterwards.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, entry in tensors.items():
        header[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.num_bytes],
        }
        offset += entry.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with writing(path), open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for entry in tensors.values():
            file.write(np.ascontiguousarray(entry.read()).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def write_weights(
    directory: Path, tensors: Tensors, max_shard_bytes: int, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes `model.safetensors`, or shards of at most `max_shard_bytes` (one tensor at least) and their index."""
    shards: list[dict[str, TensorEntry]] = [{}]
    used = 0
    for name, entry in tensors.items():
        if shards[-1] and used + entry.num_bytes > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = entry
        used += entry.num_bytes
    if len(shards) == 1:
        write_safetensors(directory / SINGLE_FILE, shards[0], metadata)
        return
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    named = dict(zip(names, shards, strict=True))
    for shard_name, shard in named.items():
        write_safetensors(directory / shard_name, shard, metadata)
    weight_map = {name: shard_name for shard_name, shard in named.items() for name in shard}
    total = sum(entry.num_bytes for entry in tensors.values())
    write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failed write (full disk, no permission) into a UserError that names the path."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write '{path}': {reason}; free space or choose another place") from error


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file, UTF-8, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(json.dumps(values, ensure_ascii=False, indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        MissingFileError, UserError: no such file, or it is not a JSON object.
    """
    if not path.is_file():
        raise MissingFileError(f"'{path}' does not exist")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"'{path}' holds no JSON object")
    return values


@contextlib.contextmanager
def atomic_directory(target: Path, keep: Sequence[str] = ()) -> Iterator[Path]:
    """Gives a temporary directory that becomes `target` when the block ends well and vanishes when it does not.

    Args:
        target: replaced whole if it exists.
        keep: names inside an existing `target` to carry over.

    Raises:
        UserError: the disk is full or cannot be written; what was there before is untouched.
    """
    target = Path(os.path.abspath(target))
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with writing(target):
            yield temporary
            os.chmod(temporary, 0o777 & ~_umask())
            for path in temporary.rglob("*"):
                if path.is_file():
                    _sync(path)
            if target.exists():
                _exchange(temporary, target, keep)
            else:
                os.rename(temporary, target)
            _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(temporary: Path, target: Path, keep: Sequence[str]) -> None:
    """Puts `temporary` in the place of `target`, with what `target` has of `keep`; a failed step is taken back."""
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    moves = [(target / name, temporary / name) for name in keep]
    moves = [(source, place) for source, place in moves if source.exists() and not place.exists()]
    moves += [(target, old / "old"), (temporary, target)]
    done: list[tuple[Path, Path]] = []
    try:
        for source, place in moves:
            os.rename(source, place)
            done.append((source, place))
    except BaseException:
        for source, place in reversed(done):
            os.rename(place, source)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
