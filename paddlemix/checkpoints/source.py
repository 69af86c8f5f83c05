"""An opened checkpoint: its complete configuration and its weights under our names, not yet read.

Joins what some layouts keep apart (an original LLaVA-1.5 has its vision tower beside it).  Both loading into a model
and converting between layouts start here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paddlemix.checkpoints.files import read_weights
from paddlemix.checkpoints.fused import split_fused
from paddlemix.checkpoints.hub import is_model_name, local_model, resolve_model
from paddlemix.checkpoints.keymap import KeyMap, is_linear_weight
from paddlemix.checkpoints.layouts import Layout, is_adapter, recognise
from paddlemix.checkpoints.tensors import TensorEntry, transposed
from paddlemix.errors import MissingFileError, UserError
from paddlemix.models.configuration import LlavaConfig
from paddlemix.models.presets import PUBLISHED_NAMES, TOWERS
from paddlemix.processors.image import CLIP_MEAN, CLIP_STD

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
        fused: PaddleMIX's options for joined weights, see `fused.split_fused`.
    """

    directory: Path
    kind: str
    config: LlavaConfig
    processor: dict[str, Any]
    keymaps: tuple[KeyMap, ...]
    tower_directory: Path | None = None
    fused: tuple[str, ...] = ()

    def tensors(self) -> dict[str, TensorEntry]:
        """Every weight under our name and in our orientation, unread.

        Raises:
            MissingFileError, UserError: files are missing or damaged, or hold weights that the layout does not know.
        """
        tensors = self._own_tensors()
        if self.tower_directory is None:
            return tensors
        tower = Source.open(self.tower_directory).tensors()
        inside = {name: entry for name, entry in tensors.items() if not name.startswith(_TOWER)}
        return {**inside, **{name: entry for name, entry in tower.items() if name.startswith(_TOWER)}}

    def holds_tower(self) -> bool:
        """Whether the checkpoint's own files have tower weights."""
        return any(name.startswith(_TOWER) for name in self._own_tensors())

    def _own_tensors(self) -> dict[str, TensorEntry]:
        tensors = rename(read_weights(self.directory), self.keymaps, self.directory)
        if self.kind == "original":
            tensors = split_fused(tensors, self.config.text, self.fused)
            if not self.config.image_newline:
                tensors.pop("image_newline", None)  # PaddleMIX makes and saves one for every model, LLaVA-1.5 too
        return tensors

    @classmethod
    def open(cls, directory: Path) -> Source:
        """Reads configuration files, no weights.

        Raises:
            MissingFileError: the directory, its `config.json` or the tower that it names is not there.
            UserError: the layout is not known.
        """
        layout = recognise(directory)
        plain = cls(directory, layout.kind, layout.config, layout.processor, layout.keymaps, fused=layout.fused)
        return _with_tower(plain, layout) if layout.tower is not None else plain


def open_source(path: str | Path) -> Source:
    """Opens a model directory or name, with a plain word where it is an adapter or a tower."""
    directory = resolve_model(path)
    if is_adapter(directory):
        raise UserError(f"{directory} is an adapter, expected a whole model; merge it first (paddlemix merge-lora)")
    source = Source.open(directory)
    if source.kind == "clip":
        raise UserError(f"{directory} is a CLIP tower, expected a language model; give it as mm_vision_tower")
    return source


def _with_tower(source: Source, layout: Layout) -> Source:
    """Completes an original LLaVA checkpoint with its tower's sizes, and with its weights where they are beside it."""
    assert layout.tower is not None
    published = TOWERS.get(PUBLISHED_NAMES.get(layout.tower, ""))
    if published is not None and local_tower(source.directory, layout.tower) is None and source.holds_tower():
        sizes = {"image_size": published.image_size, "patch_size": published.patch_size}
        pixels = {"image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)}
        config = replace(source.config, vision=published)
        return replace(source, config=config, processor={**pixels, **source.processor, **sizes})
    tower_directory = find_tower(source.directory, layout.tower)
    tower = Source.open(tower_directory)
    if tower.kind != "clip":
        raise UserError(f"mm_vision_tower '{layout.tower}' ({tower_directory}) is no CLIP vision tower")
    return replace(
        source,
        config=replace(source.config, vision=tower.config.vision),
        # what the checkpoint itself declares about pixels wins, but for the sizes, which belong to the weights
        processor={**tower.processor, **source.processor, **pick_sizes(tower.processor)},
        tower_directory=None if layout.tower_inside and source.holds_tower() else tower_directory,
    )


def pick_sizes(processor: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a tower's processor values that its weights decide."""
    return {key: processor[key] for key in ("image_size", "patch_size")}


def find_tower(directory: Path, tower: str) -> Path:
    """The directory of a vision tower.

    Args:
        directory: of the checkpoint that names it; a relative path is first tried from here.
        tower: what the checkpoint's `mm_vision_tower` says; a name is downloaded where it is nowhere on this machine.

    Raises:
        MissingFileError: says where it looked.
    """
    found = local_tower(directory, tower)
    if found is not None:
        return found
    looked = ", ".join(str(candidate) for candidate in dict.fromkeys(_near(directory, tower)))
    message = (
        f"the vision tower '{tower}' that {directory}/config.json names was not found (looked at {looked}); "
        "place its directory at one of these"
    )
    if not is_model_name(tower):
        raise MissingFileError(message)
    try:
        return resolve_model(tower)
    except MissingFileError as error:
        raise MissingFileError(f"{message}\n{error}") from error


def _near(directory: Path, tower: str) -> list[Path]:
    return [directory / tower, Path(tower), directory / Path(tower).name, directory.parent / Path(tower).name]


def local_tower(directory: Path, tower: str) -> Path | None:
    """A tower near the checkpoint or in a cache."""
    near = next((candidate for candidate in _near(directory, tower) if candidate.is_dir()), None)
    return local_model(tower) if near is None and is_model_name(tower) else near


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
