"""Which files tensors are written to: decided by their sizes alone, so that it is the same whoever writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from paddlemix.checkpoints.files.tensors import TensorEntry, Tensors

MAX_SHARD_BYTES = 5 * 1024**3


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file before it is written.

    Args:
        name: of the file.
        tensors: in the file's order.
        metadata: texts in the file's header.
    """

    name: str
    tensors: Tensors
    metadata: Mapping[str, str] = field(default_factory=dict)


def shard_files(
    stem: str, tensors: Tensors, max_bytes: int = MAX_SHARD_BYTES, metadata: Mapping[str, str] | None = None
) -> list[TensorFile]:
    """`<stem>.safetensors`, or shards `<stem>-0000k-of-0000n.safetensors` of at most `max_bytes` (one tensor at least).

    Args:
        stem: e.g. "model".
        tensors: kept in their order.
    """
    shards: list[dict[str, TensorEntry]] = [{}]
    used = 0
    for name, entry in tensors.items():
        if shards[-1] and used + entry.num_bytes > max_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = entry
        used += entry.num_bytes
    names = [f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    return [TensorFile(name, shard, dict(metadata or {})) for name, shard in zip(names, shards, strict=True)]


def index_values(files: Sequence[TensorFile]) -> dict[str, Any] | None:
    """The content of `<stem>.safetensors.index.json`; None for a single file, which needs no index."""
    if len(files) == 1:
        return None
    total = sum(entry.num_bytes for file in files for entry in file.tensors.values())
    weight_map = {name: file.name for file in files for name in file.tensors}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}
