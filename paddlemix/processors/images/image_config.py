"""An `ImageSpec` as keys of `processor_config.json`, and back; the names are those of LLaVA and of transformers.

Knows no file: `llava.py` makes the whole content of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paddlemix.errors import UserError
from paddlemix.processors.images.image_spec import ImageSpec, parse_pinpoints

# keys of it that only a model has whose pictures are not prepared as CLIP's are
PIXEL_OPTIONS = ("size", "resample", "rescale_factor", "do_normalize")


def image_spec_to_dict(spec: ImageSpec) -> dict[str, Any]:
    """The image part of a `processor_config.json`, the reverse of `image_spec_from_dict`."""
    return {
        "image_aspect_ratio": spec.aspect_mode,
        "image_grid_pinpoints": [list(pinpoint) for pinpoint in spec.grid_pinpoints] or None,
        "mm_patch_merge_type": spec.merge_type,
        "mm_vision_select_feature": "cls_patch" if spec.cls_token else "patch",
        "image_size": spec.tile_size,
        "patch_size": spec.patch_size,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        **pixel_options(spec),
    }


def pixel_options(spec: ImageSpec) -> dict[str, Any]:
    """The keys of a `processor_config.json` that only a spec unlike CLIP's has; named as transformers names them."""
    side, values = spec.resized_side, dict[str, Any]()
    if spec.squash or side != spec.tile_size:
        values["size"] = {"height": side, "width": side} if spec.squash else {"shortest_edge": side}
    options = {
        "resample": (spec.resample, 3),
        "rescale_factor": (spec.rescale_factor, 1 / 255),
        "do_normalize": (spec.normalise, True),
    }
    return {**values, **{key: value for key, (value, usual) in options.items() if value != usual}}


def with_tile_size(values: Mapping[str, Any], tile_size: int) -> dict[str, Any]:
    """The image part of a `processor_config.json` for tiles of another size.

    Args:
        values: of the present tiles.
        tile_size: pixels.

    Returns:
        The values; what pictures are resized to follows the tile.

    Raises:
        UserError: pictures are resized to another size than the tile's, so the new size is unknown.
    """
    old, size = values.get("image_size"), values.get("size")
    if size is None or old == tile_size:
        return {**values, "image_size": tile_size}
    # size                           -> for the new tile
    # absent: the tile's short side  -> absent
    # both sides, equal to the tile  -> both sides of the new tile: pictures are squeezed into it as before
    # larger than the tile           -> unknown, refused
    side = size.get("height") or size.get("shortest_edge")
    if "height" not in size or side != (old or side):
        raise UserError(
            f"pictures are resized to {side} pixels before a tile of {old} is cut out, which does not say what "
            f"they are resized to for tiles of {tile_size} (vision_image_size); set size and crop_size in "
            "preprocessor_config.json to the same value, or leave vision_image_size out"
        )
    return {**values, "image_size": tile_size, "size": {"height": tile_size, "width": tile_size}}


def image_spec_from_dict(values: dict[str, Any]) -> ImageSpec:
    """The image part of a `processor_config.json`; keys as `image_spec_to_dict` writes them.

    Raises:
        KeyError: a key is missing.
        UserError: a value is not allowed.
    """
    # null counts as absent, as everywhere in declared files
    values = {key: value for key, value in values.items() if value is not None}
    size = values.get("size", {})
    try:
        return ImageSpec(
            tile_size=int(values["image_size"]),
            patch_size=int(values["patch_size"]),
            aspect_mode=values["image_aspect_ratio"],
            grid_pinpoints=parse_pinpoints(values.get("image_grid_pinpoints"), int(values["image_size"])),
            merge_type=values.get("mm_patch_merge_type") or "flat",
            mean=tuple(values["image_mean"]),
            std=tuple(values["image_std"]),
            resize_to=size.get("shortest_edge") or size.get("height"),
            squash="height" in size,
            resample=int(values.get("resample", 3)),
            rescale_factor=float(values.get("rescale_factor", 1 / 255)),
            normalise=values.get("do_normalize") is not False,
            cls_token=values.get("mm_vision_select_feature") == "cls_patch",
        )
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"the image settings {values} cannot be read: {error}") from error
