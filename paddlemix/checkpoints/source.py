"""An opened checkpoint: its complete configuration and its weights under our names, not yet read.

Joins what some layouts keep apart (an original LLaVA-1.5 has its vision tower beside it).  Loading a model and
converting between layouts both begin here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paddlemix.checkpoints.files.tensors import TensorEntry, transposed
from paddlemix.checkpoints.files.weight_files import read_weights
from paddlemix.checkpoints.hub.part_places import find_part, local_part
from paddlemix.checkpoints.hub.resolve import resolve_model
from paddlemix.checkpoints.layouts.config_readers import Layout, tower_sizes
from paddlemix.checkpoints.layouts.joined_weights import split_fused
from paddlemix.checkpoints.layouts.recognise import is_adapter, recognise
from paddlemix.checkpoints.layouts.towers import (
    INTERN_VIT_FORM,
    TOWER_KINDS,
    fit_positions,
    input_size,
    published_tower,
    split_tower,
    stored_image_size,
    tower_form,
)
from paddlemix.checkpoints.layouts.weight_names import XTUNER_PROJECTOR, KeyMap, is_linear_weight
from paddlemix.checkpoints.layouts.xtuner_layout import XTunerParts, is_xtuner, read_xtuner
from paddlemix.errors import UserError
from paddlemix.models.configuration import LlavaConfig, VisionConfig
from paddlemix.models.presets import PUBLISHED_NAMES, TOWERS
from paddlemix.processors.images.image_config import PIXEL_OPTIONS, with_tile_size

_TOWER = "vision_tower."


@dataclass(frozen=True)
class Source:
    """A checkpoint directory, understood but not loaded.

    Args:
        directory: where it is.
        kind: its layout, see `config_readers.Layout`.
        config: complete sizes.
        processor: values of a `processor_config.json`, as far as they are declared.
        keymaps: names its weights may have.
        tower_directory: where the tower's weights are if not inside.
        fused: which weights are joined, see `joined_weights.split_fused`.
        projector_directory: where the projector's weights are if apart, as XTuner keeps them.
        resized: whether the tower's image size may differ from that of its weights, whose position embeddings are then
            interpolated.
    """

    directory: Path
    kind: str
    config: LlavaConfig
    processor: dict[str, Any]
    keymaps: tuple[KeyMap, ...]
    tower_directory: Path | None = None
    fused: tuple[str, ...] = ()
    projector_directory: Path | None = None
    resized: bool = False

    def tensors(self) -> dict[str, TensorEntry]:
        """Every weight under our name and in our orientation, unread.

        Raises:
            MissingFileError, UserError: files are missing or damaged, or hold weights that the layout does not know.
        """
        tensors = self._own_tensors()
        if self.tower_directory is not None:
            # a tower outside replaces one inside, which may be there too, untrained
            tower = Source.open(self.tower_directory).tensors()
            inside = {name: entry for name, entry in tensors.items() if not name.startswith(_TOWER)}
            tensors = {**inside, **{name: entry for name, entry in tower.items() if name.startswith(_TOWER)}}
        if self.projector_directory is not None:
            weights = read_weights(self.projector_directory)
            tensors = {**tensors, **rename(weights, (XTUNER_PROJECTOR,), self.projector_directory)}
        vision = self.config.vision
        return fit_positions(tensors, vision) if self.resized and vision is not None else tensors

    def holds_tower(self) -> bool:
        """Whether the checkpoint's own files have tower weights."""
        return any(name.startswith(_TOWER) for name in self._own_tensors())

    def _own_tensors(self) -> dict[str, TensorEntry]:
        # names first, then InternViT's joined matrix, then PaddleMIX's and InternLM2's: each step expects our names
        tensors = rename(read_weights(self.directory), self.keymaps, self.directory)
        if self.kind != "paddlemix":
            tensors = split_tower(tensors)
        tensors = split_fused(tensors, self.config.text, self.fused) if self.fused else tensors
        if self.kind == "original" and not self.config.image_newline:
            tensors.pop("image_newline", None)  # PaddleMIX creates and saves one for every model, even LLaVA-1.5
        return tensors

    @classmethod
    def open(cls, directory: Path) -> Source:
        """Reads configuration files, no weights.

        Raises:
            MissingFileError: the directory, its `config.json` or the tower that it names is missing.
            UserError: the layout is unknown.
        """
        if is_xtuner(directory):
            return _open_xtuner(read_xtuner(directory))
        layout = recognise(directory)
        plain = _of_layout(directory, layout)
        return _with_tower(plain, layout) if layout.tower is not None else plain


def _of_layout(directory: Path, layout: Layout) -> Source:
    return Source(directory, layout.kind, layout.config, layout.processor, layout.keymaps, fused=layout.fused)


def open_language_model(parts: XTunerParts) -> Source:
    """The language model of an XTuner directory, without tower, projector and adapters.

    Raises:
        MissingFileError: it is not where the directory says.
        UserError: it is not just a language model.
    """
    inside = parts.language_model == str(parts.directory)
    directory = parts.directory if inside else find_part(parts.directory, parts.language_model, "language model")
    layout = recognise(directory)
    if layout.kind != "language":
        raise UserError(f"{directory} is not just a language model (its layout is {layout.kind}), as XTuner's must be")
    return _of_layout(directory, layout)


def _open_xtuner(parts: XTunerParts) -> Source:
    """The whole model of an XTuner directory, without its adapters."""
    language = open_language_model(parts)
    directory = find_part(parts.directory, parts.tower, "vision tower")
    tower = Source.open(directory)
    if tower.kind not in TOWER_KINDS:
        raise UserError(f"{directory}, the vision tower of {parts.directory}, is not one (its layout is {tower.kind})")
    config = replace(
        language.config,
        vision=tower.config.vision,
        mm_projector_type=parts.mm_projector_type,
        mm_vision_select_layer=parts.mm_vision_select_layer,
    )
    processor = {**language.processor, **tower.processor, **parts.processor()}
    whole = replace(language, config=config, processor=processor)
    return replace(whole, tower_directory=directory, projector_directory=parts.projector)


def open_source(path: str | Path, inside: bool = False) -> Source:
    """Opens a model directory or name; an adapter or a tower is an error that says what to do with it.

    Args:
        inside: of an XTuner directory, the model without its adapters.
    """
    directory = resolve_model(path)
    if is_adapter(directory) and not (inside and is_xtuner(directory)):
        raise UserError(f"{directory} is an adapter, expected a whole model; merge it first (paddlemix merge-lora)")
    source = Source.open(directory)
    if source.kind in TOWER_KINDS:
        raise UserError(f"{directory} is a vision tower, expected a language model; set mm_vision_tower to it")
    return source


def with_image_size(source: Source, image_size: int | None) -> Source:
    """A checkpoint whose tower reads images of another size, pixels; None: as they are.

    Position embeddings for another grid are interpolated when weights are read.

    Raises:
        UserError: the model has no tower, a patch is larger than such an image, or `with_tile_size` does not know what
            pictures are resized to.
    """
    if image_size is None:
        return source
    if source.config.vision is None:
        raise UserError(f"vision_image_size {image_size} needs a vision tower, but {source.directory} has none")
    vision = replace(source.config.vision, image_size=image_size)
    processor = with_tile_size(source.processor, image_size)
    return replace(source, config=replace(source.config, vision=vision), processor=processor, resized=True)


def _with_tower(source: Source, layout: Layout) -> Source:
    """Completes an original LLaVA checkpoint with its tower's sizes, and with its weights where they are beside it."""
    assert layout.tower is not None
    # | the tower that config.json names   | weights are taken from                                              |
    # |------------------------------------|---------------------------------------------------------------------|
    # | not here, but weights are inside,  | inside; sizes from the preset                                       |
    # |   of a tower that is published     |                                                                     |
    # | here, unfrozen or InternViT's      | inside, if there are any                                            |
    # | here, else                         | the tower's own directory                                           |
    # | nowhere                            | a download, or an error                                             |
    if local_part(source.directory, layout.tower) is None and source.holds_tower():
        published = TOWERS.get(PUBLISHED_NAMES.get(layout.tower, "")) or published_tower(source._own_tensors())
        if published is not None:
            processor = {**tower_form(published).pixels(), **tower_sizes(published)}
            return _with_tower_values(source, layout, published, processor, None)
    directory = find_part(source.directory, layout.tower, "vision tower")
    tower = Source.open(directory)
    if tower.kind not in TOWER_KINDS or tower.config.vision is None:
        raise UserError(f"mm_vision_tower '{layout.tower}' ({directory}) is not a vision tower (CLIP, InternViT)")
    # InternVL's checkpoints carry the position embeddings that they were trained with
    inside = (layout.tower_inside or tower.kind == INTERN_VIT_FORM.kind) and source.holds_tower()
    return _with_tower_values(source, layout, tower.config.vision, tower.processor, None if inside else directory)


def _with_tower_values(
    source: Source, layout: Layout, vision: VisionConfig, processor: Mapping[str, Any], directory: Path | None
) -> Source:
    """The checkpoint with a tower's sizes and pixels; `directory` is None if the weights inside are used."""
    if "image_mean" in source.processor:  # the checkpoint has a preprocessor_config.json, which counts as a whole
        processor = {key: value for key, value in processor.items() if key not in PIXEL_OPTIONS}
    joined = replace(
        source,
        config=replace(source.config, vision=vision),
        # what the checkpoint itself declares about pixels wins, except for the sizes, which belong to the weights
        processor={**processor, **source.processor, **pick_sizes(processor)},
        tower_directory=directory,
    )
    if not tower_form(vision).smallest_input:
        return joined
    stored = stored_image_size(source._own_tensors(), vision) if directory is None else None
    return with_image_size(joined, input_size(vision, source.processor.get("image_size"), stored))


def pick_sizes(processor: Mapping[str, Any]) -> dict[str, Any]:
    """The processor values of a tower that its weights determine."""
    return {key: processor[key] for key in ("image_size", "patch_size")}


def rename(tensors: Mapping[str, TensorEntry], keymaps: tuple[KeyMap, ...], directory: Path) -> dict[str, TensorEntry]:
    """Puts weights under our names and linear weights in our orientation [in, out].

    Args:
        keymaps: tried in order; the first that knows every weight is used.

    Raises:
        UserError: no keymap knows all weights; lists those that the best one does not know.
    """
    best: list[str] | None = None
    for keymap in keymaps:
        renamed, unknown = _apply(tensors, keymap, directory)
        if not unknown:
            return renamed
        if best is None or len(unknown) < len(best):
            best = unknown
    # the keymap that knows most is the layout that was meant: its unknown names say most to the user
    listed, layouts = ", ".join(sorted(best or [])[:8]), " or ".join(keymap.name for keymap in keymaps)
    raise UserError(f"{directory} holds {len(best or [])} weights that a {layouts} checkpoint does not have: {listed}")


def _apply(
    tensors: Mapping[str, TensorEntry], keymap: KeyMap, directory: Path
) -> tuple[dict[str, TensorEntry], list[str]]:
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
            entry = replace(entry, origin=f"'{key}' of {directory}")
            renamed[name] = transposed(entry) if turn else entry
    return renamed, unknown
