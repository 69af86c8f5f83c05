"""What a model or adapter needs on this machine: its own folder, its tower, its base, and what those need in turn.

For the guard of what commands write (`paddlemix/outputs.py`).  Every place that may be meant counts, so more may be
listed than is loaded; damaged and missing files are left to the loader.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from paddlemix.checkpoints.files.weight_files import read_json
from paddlemix.checkpoints.hub.model_names import is_model_name
from paddlemix.checkpoints.hub.part_places import local_part
from paddlemix.checkpoints.hub.resolve import local_model
from paddlemix.checkpoints.layouts.file_names import ADAPTER_FILE, CONFIG_FILE, PEFT_ADAPTER_FILE
from paddlemix.checkpoints.layouts.xtuner_layout import LANGUAGE_ADAPTER, TOWER_ADAPTER, is_xtuner, read_xtuner
from paddlemix.errors import UserError
from paddlemix.outputs import Needed

_T = TypeVar("_T")
# what our own adapters name, by the key of `base`
_BASE = {"model": "base model", "tower": "vision tower", "projector_file": "projector file"}


def needed_by_model(name: str | Path, role: str = "the model") -> Iterator[Needed]:
    """All that loading a model or adapter reads, as far as it is on this machine.

    Args:
        name: directory, file of a projector, or a model's name.
        role: what it is to the command, for messages.

    Yields:
        The model itself, then its parts, their parts and so on, each place once.
    """
    # breadth first; `seen` ends the search where models name each other
    waiting, seen = list(_start(str(name), role)), set[Path]()
    while waiting:
        item = waiting.pop(0)
        place = item.path.resolve()
        if place in seen:
            continue
        seen.add(place)
        yield item
        if item.kind == "model":
            waiting += [part for value, what in _named(item.path) for part in _found(item, value, what)]


def _start(name: str, role: str) -> Iterator[Needed]:
    path = Path(name)
    if path.exists():
        yield Needed(role, path, "model" if path.is_dir() else "file")
    elif is_model_name(name):
        cached = _without_errors(lambda: local_model(name))
        if cached is not None:
            yield Needed(role, cached, "model")


def _named(directory: Path) -> Iterator[tuple[Any, str]]:
    """What the files of a model's or adapter's folder name, and what each is."""
    # original LLaVA's tower; then our adapter's base, PEFT's, XTuner's; a file that is missing names nothing
    yield _read(directory / CONFIG_FILE).get("mm_vision_tower"), "vision tower"
    settings = _read(directory / ADAPTER_FILE)
    base = _object(settings.get("base"))
    for key, what in _BASE.items():
        yield base.get(key), what
        yield _object(base.get("relative")).get(key), what
    folders = (directory, directory / LANGUAGE_ADAPTER, directory / TOWER_ADAPTER)
    for values in (settings, *(_read(folder / PEFT_ADAPTER_FILE) for folder in folders)):
        yield values.get("base_model_name_or_path"), "base model"
    xtuner = _without_errors(lambda: read_xtuner(directory) if is_xtuner(directory) else None)
    if xtuner is not None:
        yield xtuner.language_model, "language model"
        yield xtuner.tower, "vision tower"


def _found(owner: Needed, value: Any, what: str) -> Iterator[Needed]:
    """Every place that a name in the files of `owner` may mean."""
    if not isinstance(value, str) or not value or "\0" in value:  # which no file system takes
        return
    directory = owner.path
    sibling = directory.parent / Path(value).name
    places = [path for path in (directory / value, Path(value)) if os.path.exists(path)]
    cached = _without_errors(lambda: local_part(directory, value))
    # the candidates of `part_places.find_part`, all of them: which one is loaded may change before it is
    for path in (places or [sibling]) + ([] if cached is None else [cached]):
        if os.path.exists(path):
            yield Needed(f"the {what} of {owner.role}", path, "model" if path.is_dir() else "file")


def _read(path: Path) -> dict[str, Any]:
    return _without_errors(lambda: read_json(path) if path.is_file() else None) or {}


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _without_errors(read: Callable[[], _T | None]) -> _T | None:
    """What is read; None if it cannot be: the loader will report that."""
    try:
        return read()
    except (UserError, OSError):
        return None
