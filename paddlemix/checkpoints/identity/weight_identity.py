"""Which weights a model's files hold: a digest of every tensor, the same in every layout and in every exact type.

A digest covers a tensor's numbers as a torch checkpoint orders them (linear weights [out, in]), in the shortest of
bfloat16, float16 and float32 that holds them exactly; rows that llava-hf adds to a vocabulary do not count.  So the
same model has the same digests after `convert`, and one changed bit of a weight changes them.

Digests are computed once and cached until a file's size, times or inode differ.  What our own commands round
(`convert --dtype`, `quantize`) carries ORIGIN_FILE, which records what it was made from; so do its conversions.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paddlemix.cache import cache_directory, cache_key
from paddlemix.cached_table import CachedTable, TableLayout
from paddlemix.checkpoints.files.tensors import TensorEntry, transposed
from paddlemix.checkpoints.files.weight_files import read_json, write_json
from paddlemix.checkpoints.layouts.added_rows import split_added_rows
from paddlemix.checkpoints.layouts.file_names import CONFIG_FILE
from paddlemix.checkpoints.layouts.weight_names import is_linear_weight
from paddlemix.checkpoints.projector_file import read_projector_file
from paddlemix.checkpoints.source import Source, open_source
from paddlemix.errors import UserError
from paddlemix.file_locks import one_at_a_time
from paddlemix.identity import (
    DIGEST_BYTES,
    FileState,
    file_states,
    is_settled,
    num_threads,
    text_digest,
    wait_until_settled,
)
from paddlemix.progress_bar import ProgressBar

ORIGIN_FILE = "origin.json"
_VERSION = "1"  # to be raised when the definition of a digest changes: it makes cached ones invalid
_CODES = "codes "  # prefix of the digest of a quantised weight of unknown origin
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".pdparams", ".json", ".model")  # weights, and what names them
_CHUNK = 1 << 19  # numbers that are converted at once
_SHORTER = {"F16": ("BF16",), "F32": ("BF16", "F16")}
_SHOWN_AFTER = 3  # seconds until a progress bar appears
_TABLE = CachedTable(
    TableLayout(
        kind="digests",
        file="weights-1.sqlite3",
        what="digests of weights",
        columns="states TEXT NOT NULL, digests TEXT NOT NULL, checksum TEXT NOT NULL",
    )
)


@dataclass(frozen=True)
class WeightFiles:
    """The files that a model's weights come from.

    Args:
        source: the model.
        tower: the vision tower that is attached to a text-only model.
        projector_file: the projector's own file, which replaces the model's projector.
    """

    source: Source
    tower: Source | None = None
    projector_file: Path | None = None

    def digests(self) -> dict[str, str]:
        """Our name -> digest of every tensor, 32 hexadecimal digits.

        Raises:
            MissingFileError, UserError: a file is missing or damaged.
        """
        found = source_digests(self.source)
        if self.tower is not None:
            found |= source_digests(self.tower)
        if self.projector_file is not None:
            found |= _digests_of_projector(self.projector_file)
        return found


def source_digests(source: Source) -> dict[str, str]:
    """`WeightFiles.digests` of one opened checkpoint; a rounded or quantised one has those of its origin."""
    parts = [part for part in (source.directory, source.tower_directory, source.projector_directory) if part]
    files = sorted({path for part in parts for path in weight_files(part)})
    found = cached_digests([str(source.resized), *map(str, parts)], files, lambda: _comparable(source))
    return _with_origin(found, source.directory)


def weight_files(path: Path) -> list[Path]:
    """The files that decide which weights a directory, or one file, holds."""
    if not path.is_dir():
        return [path]
    return sorted(item for item in path.iterdir() if item.suffix in _SUFFIXES and item.is_file())


def _digests_of_projector(path: Path) -> dict[str, str]:
    return cached_digests(["projector", str(path)], weight_files(path), lambda: read_projector_file(path))


def _comparable(source: Source) -> dict[str, TensorEntry]:
    """A checkpoint's tensors without what only its layout has."""
    tensors = source.tensors()
    if source.kind == "hf":
        raw = read_json(source.directory / CONFIG_FILE)
        tensors, _ = split_added_rows(raw, source.directory, tensors, source.config.text.vocab_size)
    return tensors


def cached_digests(
    places: list[str], files: list[Path], tensors: Callable[[], Mapping[str, TensorEntry]]
) -> dict[str, str]:
    """`tensor_digests` from the cache if no file has changed; else they are computed, by one process at a time.

    Args:
        places: the key of these tensors in the cache: where they are, and how they are read.
        files: everything that decides which tensors there are.
        tensors: called to open them.
    """
    key = "\0".join([_VERSION, *(str(Path(place).absolute()) for place in places)]).encode("utf-8", "surrogateescape")
    with ExitStack() as stack:
        # fast way first: no lock where nothing must be computed
        states = file_states(files)
        found = _read_cached(key, _text_of(files, states))
        if found is not None:
            return found
        with suppress(UserError):  # without a folder for the cache each process computes them
            stack.enter_context(one_at_a_time(cache_directory("digests") / f"{cache_key(key)}.lock"))
        wait_until_settled(state for state in states if state is not None)
        started, states = time.time_ns(), file_states(files)
        found = _read_cached(key, _text_of(files, states))  # another process may have computed them meanwhile
        if found is None:
            found = tensor_digests(tensors())
            # Kept only if no file changed while it was read, nor so recently that its times may not show the change.
            if file_states(files) == states and all(state and is_settled(state, started) for state in states):
                _cache(key, _text_of(files, states), found)
        return found


def _text_of(files: list[Path], states: list[FileState | None]) -> str:
    return text_digest(*(value for pair in zip(files, states, strict=True) for value in pair))


def _read_cached(key: bytes, states: str) -> dict[str, str] | None:
    row = _TABLE.read([key]).get(key)
    if row is None or row[0] != states or row[2] != text_digest(key, *row[:2]):
        return None
    return dict(json.loads(row[1]))


def _cache(key: bytes, states: str, digests: dict[str, str]) -> None:
    text = json.dumps(digests)
    _TABLE.write({key: (states, text, text_digest(key, states, text))})


def tensor_digests(tensors: Mapping[str, TensorEntry]) -> dict[str, str]:
    """Our name -> digest of each tensor; see the head of this file."""
    # blake2b releases the interpreter's lock, so threads hash side by side
    names = sorted(
        tensors, key=lambda name: -tensors[name].num_bytes
    )  # largest first, so that no thread ends long after the others
    total = sum(entry.num_bytes for entry in tensors.values())
    bar = ProgressBar("hash weights", total, unit="B", delay=_SHOWN_AFTER)
    found: dict[str, str] = {}
    with bar, ThreadPoolExecutor(num_threads()) as pool:
        for name, digest in zip(names, pool.map(lambda name: _digest(name, tensors[name]), names), strict=True):
            found[name] = digest
            bar.update(tensors[name].num_bytes)
    return {name: found[name] for name in tensors}


def _digest(name: str, entry: TensorEntry) -> str:
    ordered = transposed(entry) if is_linear_weight(name, entry.shape) else entry
    # F32 numbers that fit in BF16 get the digest of their BF16 copy: a widened checkpoint is still the same model
    for shorter in _SHORTER.get(entry.dtype, ()):
        found = _hashed(ordered, shorter)
        if found is not None:
            return found
    found = _hashed(ordered, entry.dtype)
    assert found is not None
    return found


def _hashed(entry: TensorEntry, dtype: str) -> str | None:
    """The digest of a tensor's numbers as another type; None where that type does not hold them exactly."""
    hashed = hashlib.blake2b(f"{dtype} {list(entry.shape)}".encode(), digest_size=DIGEST_BYTES)
    for piece in entry.pieces():
        if dtype == entry.dtype:
            hashed.update(piece.reshape(-1).view(np.uint8).data)
            continue
        flat = piece.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            short = _exactly(flat[start : start + _CHUNK], entry.dtype, dtype)
            if short is None:
                return None
            hashed.update(short.view(np.uint8).data)
    return hashed.hexdigest()


def _exactly(numbers: np.ndarray, source: str, target: str) -> np.ndarray | None:
    """Numbers [n] in a shorter type, None where a bit would be lost."""
    if target == "BF16":
        bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint16).reshape(-1, 2)
        return None if bits[:, 0].any() else np.ascontiguousarray(bits[:, 1])  # little-endian: the low half first
    with np.errstate(over="ignore"):
        short = numbers.astype(np.float16)
    same = short.astype(np.float32).view(np.uint32) == np.ascontiguousarray(numbers).view(np.uint32)
    return short if same.all() else None


def write_origin(directory: Path, origin: Mapping[str, str]) -> None:
    """Records in a directory that was just written what its weights were made from.

    Args:
        directory: holds a rounded or quantised copy of a model.
        origin: that model's digests, see `WeightFiles.digests`.

    Raises:
        UserError: it cannot be written.
    """
    stored = tensor_digests(_comparable(open_source(directory)))
    write_json(directory / ORIGIN_FILE, {"stored": stored, "origin": dict(origin)})


def _with_origin(stored: dict[str, str], directory: Path) -> dict[str, str]:
    """The digests of a directory's origin, for each weight that is still as it was written then.

    | weight                                | digest                                           |
    |---------------------------------------|--------------------------------------------------|
    | unchanged since its origin was noted  | that of the origin                               |
    | changed since                         | one that no other model has                      |
    | without a noted origin                | its own; a quantised one's is marked by `_CODES` |
    """
    path = directory / ORIGIN_FILE
    written, origin = _read_origin(path) if path.is_file() else ({}, {})
    result = {}
    for name, parts in _weights_of(stored).items():
        # a plain weight is one tensor, a quantised one several arrays
        digest = stored[name] if parts == [name] else _CODES + text_digest(*(stored[part] for part in parts))
        unchanged = name in origin and all(written.get(part) == stored[part] for part in parts)
        if name in origin and not unchanged:
            digest = text_digest("changed", digest)
        result[name] = origin[name] if unchanged else digest
    return result


def _read_origin(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    values = read_json(path)
    try:
        return dict(values["stored"]), dict(values["origin"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"'{path}' cannot be understood ({error!r}); copy it again, or remove it; without it, adapters of the "
            "model that this one was made from are refused"
        ) from error


def _weights_of(stored: Mapping[str, str]) -> dict[str, list[str]]:
    """Weight -> the tensors that hold it: itself, or the arrays of `peft/quantized_weight.py`."""
    found: dict[str, list[str]] = {}
    for name in stored:
        before, mark, _ = name.partition(".weight_")
        found.setdefault(f"{before}.weight" if mark else name, []).append(name)
    return found


def differing(then: Mapping[str, str], now: Mapping[str, str], names: Collection[str]) -> tuple[list[str], bool]:
    """The weights that differ between two models.

    Args:
        names: those to compare.

    Returns:
        Their names, and whether all of `names` could be compared: a quantised weight of unknown origin cannot be
        compared with one in floating point.
    """
    wrong, complete = [], True
    for name in sorted(names):
        old, new = then.get(name), now.get(name)
        if old is None or new is None or old.startswith(_CODES) != new.startswith(_CODES):
            complete = False
        elif old != new:
            wrong.append(name)
    return wrong, complete
