"""What a model is put together from, opened but not loaded: its directory, a vision tower, a projector file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from paddlemix.checkpoints.hub.resolve import resolve_model
from paddlemix.checkpoints.identity.weight_identity import WeightFiles
from paddlemix.checkpoints.layouts.towers import TOWER_KINDS
from paddlemix.checkpoints.source import Source, open_source
from paddlemix.errors import UserError
from paddlemix.log import logger
from paddlemix.models.configuration import LlavaConfig


@dataclass(frozen=True, kw_only=True)
class BaseSpec:
    """What a model is put together from before training.

    Args:
        model: its directory or name.
        tower: directory or name of a vision tower, used where `model` has none.
        mm_projector_type, mm_vision_select_layer, mm_vision_select_feature: of the new projector in that case.
        image_newline: whether the new parts include the end-of-row vector (LLaVA-1.6).
        vision_image_size: pixels that the tower reads, whatever it was trained on; None: as in the directory.
        projector_file: file with projector weights to start from.
        inside: of an XTuner directory, the model without the adapters inside it.
        quantize: how the language model's linear layers are stored, one of `quantized_weight.KINDS`; None: as in the
            directory.
        starts_projector: whether the projector is to be trained: one that is missing altogether is then new.
    """

    model: str
    tower: str | None = None
    mm_projector_type: str = "mlp2x_gelu"
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"
    image_newline: bool = False
    vision_image_size: int | None = None
    projector_file: str | None = None
    inside: bool = False
    quantize: str | None = None
    starts_projector: bool = False


def open_weights(spec: BaseSpec) -> WeightFiles:
    """Opens what a model is put together from: the model, a tower where it has none, a projector's own file.

    Raises:
        MissingFileError, UserError: see `load_base`.
    """
    source = open_source(spec.model, spec.inside)
    # a model's own tower wins over the one that is named: its projector was trained for that
    attached = source.config.vision is None and spec.tower is not None
    if not attached and spec.tower is not None:
        logger.warning("%s has its own vision tower; mm_vision_tower '%s' is not used", spec.model, spec.tower)
    tower = _open_tower(spec.tower) if attached and spec.tower else None
    return WeightFiles(source, tower, None if spec.projector_file is None else Path(spec.projector_file))


def check_tower(config: LlavaConfig, spec: BaseSpec) -> None:
    """Checks that there is a tower for the projector that is to be trained.

    Args:
        config: of the model that `spec` describes.

    Raises:
        UserError: there is no tower.
    """
    if spec.starts_projector and config.vision is None:
        raise UserError(
            f"mm_vision_tower is missing: {spec.model} is a language model alone, and its projector is to be trained; "
            "set mm_vision_tower to a directory or name, e.g. openai/clip-vit-large-patch14-336"
        )


def _open_tower(tower: str) -> Source:
    source = Source.open(resolve_model(tower))
    if source.kind not in TOWER_KINDS:
        raise UserError(f"mm_vision_tower '{tower}' is not a vision tower (its layout is {source.kind})")
    return source


def attach_tower(text: Source, tower: Source, spec: BaseSpec) -> Source:
    """A text-only checkpoint with a tower's sizes and pixels; neither's weights are read."""
    # how the tower is read belongs to the projector, so it comes from the one who asks for a new projector
    config = replace(
        text.config,
        vision=tower.config.vision,
        mm_projector_type=spec.mm_projector_type,
        mm_vision_select_layer=spec.mm_vision_select_layer,
        mm_vision_select_feature=spec.mm_vision_select_feature,
        image_newline=spec.image_newline,
    )
    # Later wins: the tower knows its pixels, and a new projector has seen no picture yet, so pictures are resized to
    # squares, as LLaVA pretrains.
    processor = {
        **text.processor,
        **tower.processor,
        "image_aspect_ratio": "square",
        "mm_vision_select_feature": spec.mm_vision_select_feature,
    }
    return replace(text, config=config, processor=processor)
