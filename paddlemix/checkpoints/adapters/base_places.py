"""Where an adapter's base may be now, and which of several places holds it.

An adapter of ours records each part of its base by its absolute place and relative to itself.  Folders are copied and
moved, so both may exist and be different models: what the files hold then decides, not the order.
"""

from __future__ import annotations

import os
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from paddlemix.checkpoints.adapters.adapter import AdapterFiles
from paddlemix.checkpoints.base_model import BaseSpec
from paddlemix.checkpoints.hub.model_names import is_model_name
from paddlemix.checkpoints.hub.part_places import searched
from paddlemix.checkpoints.hub.resolve import resolve_model
from paddlemix.checkpoints.identity.declared_identity import text_values
from paddlemix.checkpoints.identity.weight_identity import differing, source_digests, tensor_digests
from paddlemix.checkpoints.projector_file import NEW_PARTS, read_projector_file
from paddlemix.checkpoints.source import Source, open_source
from paddlemix.errors import MissingFileError, UserError

_FLAGS = "pass its folder with --model-base (chat, predict) or --model_name_or_path (merge-lora), "
_UP = f"..{os.sep}"


def base_of(adapter: AdapterFiles, model: str | None = None) -> BaseSpec:
    """Where an adapter's base is now: at the same place relative to it as when it was saved, or at its absolute place.

    Args:
        model: the base model's directory if the user names it; a tower and the rest are still the adapter's.

    Raises:
        MissingFileError: at neither place.
    """
    # a later version may know further keys, and "relative" is not one of the base
    known = {item.name for item in fields(BaseSpec)}
    spec = BaseSpec(**{key: value for key, value in adapter.base.items() if key in known})
    found: dict[str, Any] = {}
    for key in ("model", "tower", "projector_file"):
        value = getattr(spec, key)
        if value is None:
            continue
        if key == "model" and model is not None:
            found |= {"model": model, "inside": False}
            continue
        # a foreign adapter names the tower that its base has inside; only a text-only base needs it
        if key == "tower" and adapter.foreign is not None and not _needs_tower(replace(spec, **found), adapter):
            found[key] = None
            continue
        candidates = possible_places(adapter, key, value)
        place = choose_place(adapter, key, candidates)
        if place is None and is_model_name(value):
            continue  # loading resolves the name
        if place is None:
            raise MissingFileError(
                f"the base {key} of the adapter {adapter.directory} was not found ({searched(candidates)}); put it "
                f"back, {_FLAGS if key == 'model' else ''}or set its new place in {adapter.place_of_base(key)}"
            )
        found[key] = str(place)
    return replace(spec, **found)


def _needs_tower(spec: BaseSpec, adapter: AdapterFiles) -> bool:
    """Whether a foreign adapter's base is a language model alone, which then needs the adapter's projector too."""
    if open_source(resolve_model(spec.model), spec.inside).config.vision is not None:
        return False
    if not any(name.startswith(NEW_PARTS) for name in adapter.tensors()):
        raise MissingFileError(
            f"neither the adapter {adapter.directory} nor its base {spec.model} has projector weights; LLaVA writes "
            "them to non_lora_trainables.bin when training ends: copy that file too"
        )
    return True


def base_reference(spec: BaseSpec, directory: Path) -> dict[str, Any]:
    """A base as an adapter records it: names, and places absolute and relative to the adapter.

    Args:
        directory: where the adapter will be, which is not where it is while it is written.
    """
    values: dict[str, Any] = asdict(spec)
    relative = {}
    for key in ("model", "tower", "projector_file"):
        if values[key] is not None and (os.path.exists(values[key]) or not is_model_name(values[key])):
            values[key] = os.path.abspath(values[key])
            # real paths: a link on the way would make ".." lead elsewhere
            relative[key] = os.path.relpath(os.path.realpath(values[key]), os.path.realpath(directory))
    return {**values, "relative": relative}


def possible_places(adapter: AdapterFiles, key: str, value: str) -> list[Path]:
    """Where a part of the base may be, the likeliest first; none is accessed.

    Args:
        key: "model", "tower" or "projector_file".
        value: its place or name when the adapter was saved.
    """
    relative = adapter.base.get("relative", {}).get(key)
    near = [] if relative is None else [_resolved(adapter, relative)]
    if relative is not None and adapter.foreign is None and relative.startswith(_UP * 2):
        # earlier versions counted from a folder inside the adapter's own when a run ended, so one level too deep
        shorter = _resolved(adapter, relative.removeprefix(_UP))
        near = [near[0], shorter] if adapter.directory.name.startswith("checkpoint-") else [shorter, near[0]]
    sibling = adapter.directory.parent / Path(value).name
    if adapter.foreign is None and not adapter.base_digests():  # nothing would reveal a wrong one
        return [Path(value), *near, sibling]
    return [*near, Path(value), sibling]


def _resolved(adapter: AdapterFiles, relative: str) -> Path:
    """A place relative to the adapter, without "..": it was counted from where the adapter really is."""
    return Path(os.path.normpath(os.path.join(os.path.realpath(adapter.directory), relative)))


def choose_place(adapter: AdapterFiles, key: str, places: list[Path]) -> Path | None:
    """The place of the base; None if all of them are empty.

    If several hold something, it is the first whose weights, and declared values of the language model, are those that
    the adapter was trained on, else the first: loading compares it completely.
    """
    found: list[Path] = []
    for place in places:
        # Unlike the method of Path, this is False for a name that no file system can hold.
        if os.path.exists(place) and not any(place.samefile(other) for other in found):
            found.append(place)
    if len(found) < 2 or adapter.foreign is not None:
        return found[0] if found else None
    return next((place for place in found if _holds(adapter, key, place)), found[0])


def _holds(adapter: AdapterFiles, key: str, place: Path) -> bool:
    """Whether the weights at a place are those of the adapter's base, and its declared values the same."""
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
