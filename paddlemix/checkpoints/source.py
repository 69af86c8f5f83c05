"""An opened checkpoint: its complete configuration and its weights under our names, not yet read.

Joins what some layouts keep apart (an original LLaVA-1.5 has its vision tower beside it).  Both loading into a model
and converting between layouts start here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from paddlemix.checkpoints.files import TensorEntry, read_weights
from paddlemix.checkpoints.keymap import KeyMap, is_linear_weight
from paddlemix.checkpoints.layouts import Layout, recognise
from paddlemix.errors import MissingFileError, UserError
from paddlemix.models.configuration import LlavaConfig

_TOWER = "vision_tower."


@dataclass(frozen=True)
class Source:
    """A checkpoint directory, understood but not loaded.

    Args:
        directory: where it is.
        kind: its layout, see `layouts.Layout`.
        config: complete sizes.
        processor: values of a `processor_config.json` as far as they are declared.
        keymaps: names its weights may have.
        tower_directory: where the tower's weights are if not inside.
    """

    directory: Path
    kind: str
    config: LlavaConfig
    processor: dict[str, Any]
    keymaps: tuple[KeyMap, ...]
    tower_directory: Path | None = None

    def tensors(self) -> dict[str, TensorEntry]:
        """Every weight under our name and in our orientation, unread.

        Raises:
            MissingFileError, UserError: files are missing or damaged, or hold weights that the layout does not know.
        """
        tensors = rename(read_weights(self.directory), self.keymaps, self.directory)
        if self.tower_directory is None:
            return tensors
        tower = Source.open(self.tower_directory).tensors()
        inside = {name: entry for name, entry in tensors.items() if not name.startswith(_TOWER)}
        return {**inside, **{name: entry for name, entry in tower.items() if name.startswith(_TOWER)}}

    @classmethod
    def open(cls, directory: Path) -> Source:
        """Reads configuration files, no weights.

        Raises:
            MissingFileError: the directory, its `config.json` or the tower that it names is not there.
            UserError: the layout is not known.
        """
        layout = recognise(directory)
        plain = cls(directory, layout.kind, layout.config, layout.processor, layout.keymaps)
        return _with_tower(plain, layout) if layout.tower is not None else plain


def _with_tower(source: Source, layout: Layout) -> Source:
    """Completes an original LLaVA checkpoint with its tower's sizes, and with its weights where they are beside it."""
    assert layout.tower is not None
    tower_directory = find_tower(source.directory, layout.tower)
    tower = Source.open(tower_directory)
    if tower.kind != "clip":
        raise UserError(f"mm_vision_tower '{layout.tower}' ({tower_directory}) is no CLIP vision tower")
    return replace(
        source,
        config=replace(source.config, vision=tower.config.vision),
        processor={**source.processor, **tower.processor},
        tower_directory=None if layout.tower_inside and _holds_tower(source) else tower_directory,
    )


def _holds_tower(source: Source) -> bool:
    inside = rename(read_weights(source.directory), source.keymaps, source.directory)
    return any(name.startswith(_TOWER) for name in inside)


def find_tower(directory: Path, tower: str) -> Path:
    """The directory of a vision tower.

    Args:
        directory: of the checkpoint that names it; a relative path is first tried from here.
        tower: what the checkpoint's `mm_vision_tower` says.

    Raises:
        MissingFileError: says where it looked.
    """
    candidates = [directory / tower, Path(tower), directory / Path(tower).name, directory.parent / Path(tower).name]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    looked = ", ".join(str(candidate) for candidate in dict.fromkeys(candidates))
    raise MissingFileError(
        f"the vision tower '{tower}' that {directory}/config.json names was not found (looked at {looked}); "
        "place its directory at one of these"
    )


def rename(tensors: Mapping[str, TensorEntry], keymaps: tuple[KeyMap, ...], directory: Path) -> dict[str, TensorEntry]:
    """Puts weights under our names and linear weights in our orientation [in, out].

    Args:
        keymaps: tried in order; the first that knows every weight is used.

    Raises:
        UserError: no keymap knows all weights; lists those that the best one does not know.
    """
    best: list[str] | None = None
    for keymap in keymaps:
        renamed, unknown = _apply(tensors, keymap)
        if not unknown:
            return renamed
        if best is None or len(unknown) < len(best):
            best = unknown
    listed, layouts = ", ".join(sorted(best or [])[:8]), " or ".join(keymap.name for keymap in keymaps)
    raise UserError(f"{directory} holds {len(best or [])} weights that a {layouts} checkpoint does not have: {listed}")


def _apply(tensors: Mapping[str, TensorEntry], keymap: KeyMap) -> tuple[dict[str, TensorEntry], list[str]]:
    renamed: dict[str, TensorEntry] = {}
    unknown = []
    for key, entry in tensors.items():
        try:
            name = keymap.to_ours(key)
        except KeyError:
            unknown.append(key)
            continue
        if name is not None:
            turn = keymap.transposed and is_linear_weight(name, entry.shape)
            renamed[name] = transposed(entry) if turn else entry
    return renamed, unknown


def transposed(entry: TensorEntry) -> TensorEntry:
    """The same matrix with its axes exchanged, read when it is needed."""

    def read() -> np.ndarray:
        return np.ascontiguousarray(entry.read().T)

    return TensorEntry(entry.dtype, entry.shape[::-1], read)
