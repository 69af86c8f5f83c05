"""Weight files on disk, tensor by tensor.

Reads safetensors through a memory map and writes them in one streaming pass, so that the memory needed is that of one
tensor; finds the weight files of a directory, pickled ones of torch and Paddle included.  Knows no weight's meaning.

Source of the format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paddlemix.checkpoints.files.directories import atomic_directory as atomic_directory
from paddlemix.checkpoints.files.directories import writing
from paddlemix.checkpoints.files.finite import all_finite
from paddlemix.checkpoints.files.header import TensorRange, read_header
from paddlemix.checkpoints.files.pickles import read_paddle, read_torch
from paddlemix.checkpoints.files.shards import TensorFile, index_values, shard_files
from paddlemix.checkpoints.files.tensors import NUMPY_TYPES, TensorEntry, Tensors
from paddlemix.checkpoints.files.tensors import array_entry as array_entry
from paddlemix.errors import MissingFileError, UserError
from paddlemix.json_files import describe, read_object

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_LONGEST_NAME = 80  # characters of a shard's name: in bytes less than any file system allows
_SHOWN = 200  # characters of a name or reason in an error
_SAMPLED = 512  # elements at either end of a tensor by which two sets of weights are compared
# called with a tensor's name and, piece by piece, its bytes as they were written
OnWritten = Callable[[str, memoryview], None]
read_json = read_object  # what `write_json` wrote, and any other declared file


def read_safetensors(path: Path) -> dict[str, TensorEntry]:
    """Lists the tensors of a file without reading them.

    Raises:
        MissingFileError: no such file.
        UserError: the file is cut short or damaged, or is not safetensors.
    """
    header = read_header(path)
    return {name: _mapped_entry(path, header.start, item) for name, item in header.tensors.items()}


def _mapped_entry(path: Path, start: int, item: TensorRange) -> TensorEntry:
    def read() -> np.ndarray:
        if 0 in item.shape:  # mmap refuses an empty range
            return np.zeros(item.shape, dtype=NUMPY_TYPES[item.dtype])
        return np.memmap(path, dtype=NUMPY_TYPES[item.dtype], mode="r", offset=start + item.begin, shape=item.shape)

    return TensorEntry(item.dtype, item.shape, read)


# index, single file and reader of each kind of weight file, the preferred kind first
_KINDS: tuple[tuple[str, str, Callable[[Path], dict[str, TensorEntry]]], ...] = (
    (INDEX_FILE, SINGLE_FILE, read_safetensors),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", read_torch),
    ("model_state.pdparams.index.json", "model_state.pdparams", read_paddle),
)


WEIGHT_FILES = tuple(single for _, single, _ in _KINDS)
_SHARD = re.compile(r".+-\d+-of-\d+\.(safetensors|bin|pdparams)")


def read_weights(directory: Path) -> dict[str, TensorEntry]:
    """Lists the tensors of a checkpoint directory: safetensors, torch's .bin or Paddle's .pdparams, whole or in shards.

    Raises:
        MissingFileError: there are none, an index names a shard that is missing, or shards have no index.
        UserError: a file is damaged, a tensor that an index promises is in no shard, or the directory holds two sets of
            weights that differ.
    """
    # Every set of weights in the directory, the preferred first.  The others must agree with it: a stale file beside a
    # new one would otherwise decide silently which model is loaded.
    found: list[tuple[str, Callable[[], dict[str, TensorEntry]]]] = []
    for index, single, read in _KINDS:
        if (directory / index).is_file():
            found.append((index, lambda index=index, read=read: read_shards(directory / index, read)))  # type: ignore[misc]
        if (directory / single).is_file():
            found.append((single, lambda single=single, read=read: read(directory / single)))  # type: ignore[misc]
    if not found:
        shards = sorted(path.name for path in directory.glob("*-of-*") if _SHARD.fullmatch(path.name))
        if shards:
            index = {".safetensors": INDEX_FILE, ".bin": _KINDS[1][0], ".pdparams": _KINDS[2][0]}[
                Path(shards[0]).suffix
            ]
            raise MissingFileError(
                f"{directory} holds {len(shards)} shards of weights, {shards[0]} first, without their index {index}; "
                "copy it from the same place"
            )
        expected = ", ".join(f"{single} or {index}" for index, single, _ in _KINDS)
        raise MissingFileError(f"no weights in {directory}: expected {expected}")
    (first, read_first), *others = found
    tensors = read_first()
    for name, read_other in others:
        difference = _difference(tensors, read_other())
        if difference:
            raise UserError(
                f"{directory} holds two different sets of weights, {first} and {name} ({difference}); remove the "
                "one that does not belong there"
            )
    return tensors


def read_weight_file(path: Path) -> dict[str, TensorEntry]:
    """Lists the tensors of one file of the kind that its suffix names: .safetensors, .bin, .pt, .pth or .pdparams.

    Raises:
        MissingFileError: no such file.
        UserError: another suffix, or the file is damaged.
    """
    kinds = {".safetensors": read_safetensors, ".pdparams": read_paddle}
    kinds |= dict.fromkeys((".bin", ".pt", ".pth"), read_torch)
    if path.suffix not in kinds:
        raise UserError(f"'{path}' is not a weight file; allowed suffixes: {', '.join(kinds)}")
    return kinds[path.suffix](path)


def read_shards(
    index_path: Path, read: Callable[[Path], dict[str, TensorEntry]] = read_safetensors
) -> dict[str, TensorEntry]:
    """Lists the tensors of the shards that an index names.

    Args:
        read: lists those of one shard.

    Raises:
        MissingFileError: the index or a shard is missing.
        UserError: a file is damaged, or no shard holds a tensor that the index promises.
    """
    directory = index_path.parent
    try:
        weight_map = read_object(index_path).get("weight_map")
    except UserError as error:
        raise UserError(f"'{index_path}' is not a weight index: {error}; copy it again") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"'{index_path}' is not a weight index: it has no weight_map of names; copy it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_file_name(shard):
            raise UserError(
                f"'{index_path}': weight_map puts '{name[:_SHOWN]}' into {describe(shard)}, which is not the name of a "
                "file beside it; copy it again"
            )
    names = sorted(set(weight_map.values()))
    shards: dict[str, dict[str, TensorEntry]] = {}
    for shard in names:
        if not (directory / shard).is_file():
            raise MissingFileError(f"{index_path} names the shard '{shard}', which is missing; copy it again")
        shards[shard] = read(directory / shard)
    lost = [name for name, shard in weight_map.items() if name not in shards[shard]]
    if lost:
        raise UserError(f"{index_path} promises {len(lost)} tensors that no shard holds, e.g. '{lost[0]}'")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _is_file_name(text: str) -> bool:
    """Whether a text names a file of the same folder, and cannot name one elsewhere on any system."""
    # an index is downloaded: "../" or "C:" in it must not reach other files
    return (
        0 < len(text) <= _LONGEST_NAME
        and text not in (".", "..")
        and not set(text) & set("/\\:")
        and text.isprintable()
    )


def _difference(first: Tensors, second: Tensors) -> str:
    """How two sets of weights differ, in a few words; "" where they do not.  Integers are buffers, not weights."""
    sets = [{name: entry for name, entry in tensors.items() if "I" not in entry.dtype} for tensors in (first, second)]
    alone = sorted(sets[0].keys() ^ sets[1].keys())
    if alone:
        return f"only one of them has '{alone[0]}'"
    for name, entry in sets[0].items():
        other = sets[1][name]
        if (entry.dtype, entry.shape) != (other.dtype, other.shape):
            return f"'{name}' is {entry.dtype} {list(entry.shape)} and {other.dtype} {list(other.shape)}"
        # Samples are enough: two sets of weights are the same model or not, and reading all of both takes long.
        ours, theirs = entry.read().reshape(-1), other.read().reshape(-1)
        for end in (slice(_SAMPLED), slice(-_SAMPLED, None)):
            if ours[end].tobytes() != theirs[end].tobytes():
                return f"'{name}' has other numbers"
    return ""


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a safetensors file carries besides its tensors.

    Raises:
        MissingFileError, UserError: see `read_safetensors`.
    """
    return read_header(path).metadata


def write_safetensors(
    path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None, on_written: OnWritten | None = None
) -> None:
    """Writes a file tensor by tensor; each is read when its turn comes and released afterwards.

    Raises:
        UserError: the disk is full or cannot be written; or a tensor has another number of bytes than its type and
            shape ask for, as where its numbers are on another process.
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
    # spaces, so that the numbers begin at a multiple of 8 and can be mapped as any type
    encoded += b" " * (-len(encoded) % 8)
    with writing(path), open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, entry in tensors.items():
            written, content, piece = 0, None, None  # the tensor before is released before the next one is read
            for piece in entry.pieces():
                content = piece.reshape(-1).view(np.uint8).data
                file.write(content)
                written += len(content)
                if on_written is not None:
                    on_written(name, content)
            # Readers map what the header says: numbers that are missing would shift all tensors after them.
            if written != entry.num_bytes:
                raise UserError(
                    f"'{name}' has {written:,} bytes, but {entry.dtype} {list(entry.shape)} are {entry.num_bytes:,}: "
                    "its numbers are not all on this process"
                )
        file.flush()
        os.fsync(file.fileno())


def write_weights(
    directory: Path,
    tensors: Tensors,
    max_shard_bytes: int,
    metadata: Mapping[str, str] | None = None,
    on_written: OnWritten | None = None,
) -> None:
    """Writes `model.safetensors`, or shards of at most `max_shard_bytes` (one tensor at least) and their index.

    Raises:
        UserError: the disk is full or cannot be written; or a weight holds NaN or infinity.
    """
    files = shard_files("model", all_finite(tensors), max_shard_bytes, metadata)
    for file in files:
        write_safetensors(directory / file.name, file.tensors, file.metadata, on_written)
    write_index(directory / INDEX_FILE, files)


def write_index(path: Path, files: Sequence[TensorFile]) -> None:
    """Writes which of some shards holds which tensor; nothing for a single file.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    index = index_values(files)
    if index is not None:
        write_json(path, index)


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file, UTF-8, whole or not at all."""
    # Under another name first: whoever reads meanwhile, and whoever comes after a kill, sees the old file or the new.
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
