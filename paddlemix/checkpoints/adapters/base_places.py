"""Where an adapter's base may be now, and which of several places holds it.

An adapter of ours remembers each part of its base by its absolute place and relative to itself.  Folders are copied and
moved, so both may exist and be different models: what the files hold then decides, not the order.
"""

from __future__ import annotations

import os
from pathlib import Path

from paddlemix.checkpoints.adapters.adapter import AdapterFiles
from paddlemix.checkpoints.identity.declared_identity import text_values
from paddlemix.checkpoints.identity.weight_identity import differing, source_digests, tensor_digests
from paddlemix.checkpoints.projector_file import read_projector_file
from paddlemix.checkpoints.source import Source
from paddlemix.errors import UserError

_UP = f"..{os.sep}"


def possible_places(adapter: AdapterFiles, key: str, value: str) -> list[Path]:
    """Where a part of the base may be, the likeliest first; none is looked at.

    Args:
        key: "model", "tower" or "projector_file".
        value: the place or name that it had when the adapter was saved.
    """
    relative = adapter.base.get("relative", {}).get(key)
    near = [] if relative is None else [adapter.directory / relative]
    if relative is not None and adapter.foreign is None and relative.startswith(_UP * 2):
        # earlier versions counted from a folder inside the adapter's own when a run ended, so one level too deep
        shorter = adapter.directory / relative.removeprefix(_UP)
        near = [near[0], shorter] if adapter.directory.name.startswith("checkpoint-") else [shorter, near[0]]
    sibling = adapter.directory.parent / Path(value).name
    if adapter.foreign is None and not adapter.base_digests():  # nothing tells a wrong one at once
        return [Path(value), *near, sibling]
    return [*near, Path(value), sibling]


def choose_place(adapter: AdapterFiles, key: str, places: list[Path]) -> Path | None:
    """The place that is the base's; None where nothing is at any of them.

    Where several hold something, it is the first whose weights, and what is declared of the language model, are those
    that the adapter was trained on, else the first: whoever loads it compares it whole.
    """
    found: list[Path] = []
    for place in places:
        if place.exists() and not any(place.samefile(other) for other in found):
            found.append(place)
    if len(found) < 2 or adapter.foreign is not None:
        return found[0] if found else None
    return next((place for place in found if _holds(adapter, key, place)), found[0])


def _holds(adapter: AdapterFiles, key: str, place: Path) -> bool:
    """Whether the weights at a place are those of the adapter's base, and a model computes with the same values."""
    then = adapter.base_digests()
    try:
        if key == "projector_file":
            now = tensor_digests(read_projector_file(place))
        else:
            source = Source.open(place)
            if key == "model" and not _computes_alike(adapter, source):
                return False
            now = source_digests(source)
    except UserError:
        return False
    names = (then.keys() & now.keys()) - adapter.tensors().keys()
    wrong, _ = differing(then, now, names)
    return bool(names) and not wrong


def _computes_alike(adapter: AdapterFiles, source: Source) -> bool:
    """Compares the language model alone: a tower may come from another place."""
    then, now = adapter.base_values(), text_values(source.config.text)
    return all(then[key] == now[key] for key in then.keys() & now.keys())
