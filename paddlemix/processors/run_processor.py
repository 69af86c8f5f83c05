"""The processor of a run: a checkpoint's, with what the run's configuration says otherwise.

The one place where a run's keys change how text and images are prepared; a run, its dry run and `check-data` all come
here, so that what is checked is what is trained.  Knows no weight and no directory's layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from paddlemix.config.schema import RunConfig
from paddlemix.errors import UserError
from paddlemix.processors.images.image_config import image_spec_from_dict, with_tile_size
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.processors.text.chat_template import resolve_template

_IMAGE_KEYS = ("image_aspect_ratio", "image_grid_pinpoints", "mm_patch_merge_type")


@dataclass(frozen=True, kw_only=True)
class VisionSizes:
    """What a model's own sizes say about the images that it reads.

    Args:
        image_size: side of a tile that the tower reads, pixels; None for a model without a tower.
        image_newline: it has the end-of-row vector of LLaVA-1.6.
    """

    image_size: int | None
    image_newline: bool


def run_processor(processor: LlavaProcessor, config: RunConfig, sight: VisionSizes | None = None) -> LlavaProcessor:
    """The processor that a run uses.

    Args:
        processor: of the base model, or of the adapter that the run continues.
        config: the run.
        sight: of the model; None where it is not known, nothing is then held against it.

    Raises:
        UserError: the model has no vector for the ends of rows, its tower reads tiles of another size, or a key's value
            does not fit another's.
    """
    changes: dict[str, Any] = {key: getattr(config, key) for key in _IMAGE_KEYS if getattr(config, key) is not None}
    # through the file's own keys: what a run changes is checked as if the checkpoint had declared it
    values = processor.to_dict()
    if config.vision_image_size is not None:
        values = with_tile_size(values, config.vision_image_size)
    spec = image_spec_from_dict({**values, **changes})
    # a name may mean another template for an XTuner model, so the checkpoint's own is passed along
    template = (
        resolve_template(config.chat_template, processor.template) if config.chat_template else processor.template
    )
    result = replace(processor, image_spec=spec, template=template)
    # a text-only model has no tower to disagree with
    if sight is not None and sight.image_size is not None:
        _check_sight(result, config, sight.image_size, sight.image_newline)
    return result


def _check_sight(processor: LlavaProcessor, config: RunConfig, image_size: int, image_newline: bool) -> None:
    spec = processor.image_spec
    # without that vector there is nothing to put at the ends of rows
    if spec.aspect_mode == "anyres" and "unpad" in spec.merge_type and not image_newline:
        raise UserError(
            f"mm_patch_merge_type '{spec.merge_type}' needs a model with an image_newline vector (LLaVA-1.6); "
            f"{config.model_name_or_path} has none, use 'spatial' or 'flat'"
        )
    # an adapter's processor may be of another tile size than the base that it is used with
    if spec.tile_size != image_size:
        raise UserError(
            f"{config.lora_path or config.model_name_or_path} prepares tiles of {spec.tile_size} pixels, but the tower "
            f"of {config.model_name_or_path} reads {image_size}; set vision_image_size to {spec.tile_size}"
        )
