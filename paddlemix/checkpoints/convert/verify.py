"""Weights written, read back and compared.

Knows no layout: names and tensors are those of the files.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paddlemix.checkpoints.files.tensors import TensorEntry, Tensors
from paddlemix.checkpoints.files.weight_files import read_weights, write_weights
from paddlemix.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """How to convert.

    Args:
        to: "paddlemix", "llava" (original), "hf" (llava-hf) or "xtuner".
        dtype: "float32", "float16" or "bfloat16"; None keeps every weight's own.
        max_shard_bytes: largest weight file.
        on_progress: called with (bytes done, bytes in all) while writing and while verifying.
    """

    to: str
    dtype: str | None = None
    max_shard_bytes: int = 5 * 1024**3
    on_progress: Callable[[int, int], None] = lambda done, total: None


@dataclass(frozen=True)
class Report:
    """What was converted: number of weights and their bytes."""

    num_tensors: int
    num_bytes: int


def write_verified(parts: dict[Path, dict[str, TensorEntry]], tag: str, conversion: Conversion) -> Report:
    """Writes the weights of one or more directories, opens them again and compares every name, shape and checksum.

    Raises:
        UserError: they cannot be written, or what is read back is not what was written.
    """
    # checksums are taken from the bytes on their way out, so what is read back is compared without a second source
    total = sum(entry.num_bytes for tensors in parts.values() for entry in tensors.values())
    done = 0
    for directory, tensors in parts.items():
        checksums: dict[str, int] = {}

        # a default, because the loop's variable would be that of its last round
        def count(name: str, content: memoryview, checksums: dict[str, int] = checksums) -> None:
            nonlocal done
            checksums[name] = zlib.crc32(content, checksums.get(name, 0))
            done += content.nbytes
            conversion.on_progress(done, 2 * total)  # written and read back: every byte counts twice

        write_weights(directory, tensors, conversion.max_shard_bytes, {"format": tag}, count)
        for num_bytes in verify(directory, tensors, checksums):
            done += num_bytes
            conversion.on_progress(done, 2 * total)
    return Report(sum(map(len, parts.values())), total)


def verify(directory: Path, tensors: Tensors, checksums: dict[str, int]) -> Iterator[int]:
    """Opens a written directory again and compares it with what was written; yields the bytes of each tensor.

    Raises:
        UserError: a tensor is missing, extra, or not what was written.
    """
    found = read_weights(directory)
    # names that only one of the two has, then the contents of the others
    wrong = sorted(found.keys() ^ tensors.keys())
    for name, entry in found.items():
        if name not in tensors:
            continue
        expected = tensors[name]
        content = np.ascontiguousarray(entry.read()).reshape(-1).view(np.uint8).data
        if (entry.dtype, entry.shape) != (expected.dtype, expected.shape) or zlib.crc32(content) != checksums[name]:
            wrong.append(name)
        yield entry.num_bytes
    if wrong:
        raise UserError(
            f"what was written to {directory} does not read back as it was ({len(wrong)} weights, e.g. '{wrong[0]}'); "
            "the disk may be faulty, choose another place"
        )
