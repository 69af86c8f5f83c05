"""preprocessor_config.json, and processor_config.json of llava-hf, in our terms: how pictures are preprocessed.

Supports what transformers' CLIPImageProcessor, LlavaImageProcessor and LlavaNextImageProcessor compute; anything else
is refused by name.  Knows no config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paddlemix.checkpoints.files.weight_files import read_json
from paddlemix.checkpoints.layouts.config_keys import PINPOINTS
from paddlemix.declared import Keys, choice, either, flag, integer, items, key_names, mapping, number, take
from paddlemix.errors import UserError
from paddlemix.processors.images.image_spec import parse_pinpoints
from paddlemix.processors.llava import PROCESSOR_FILE

PREPROCESSOR_FILE = "preprocessor_config.json"
_CLASSES = [
    name + kind
    for name in ("CLIPImageProcessor", "LlavaImageProcessor", "LlavaNextImageProcessor")
    for kind in ("", "Fast", "Pil")
]
_CLASS = choice(*_CLASSES, "CLIPFeatureExtractor", because="others resize in other ways")
_SIDE = integer(1, 1 << 16)
KEYS = Keys(
    {
        "image_processor_type": _CLASS,
        "feature_extractor_type": _CLASS,
        "image_mean": items(number(-1000, 1000), 3, 3),
        "image_std": items(either(number(1e-9, 1000), number(-1000, -1e-9)), 3, 3),
        "crop_size": either(_SIDE, mapping),
        "size": either(_SIDE, mapping),
        "resample": choice(1, 2, 3, because="Pillow's Lanczos, bilinear and bicubic filters"),
        "rescale_factor": number(1e-9, 1e6),
        "do_rescale": flag,
        "do_normalize": flag,
        "do_center_crop": flag,
        "do_pad": flag,
        "image_grid_pinpoints": PINPOINTS,
    },
    {"do_resize": choice(True, because="the tower reads one size")},
    # do_convert_rgb: pictures are always converted to RGB first, which is all that other modes need
    key_names(
        """
        do_convert_rgb processor_class _valid_processor_keys _processor_class auto_map data_format input_data_format
        return_tensors device disable_grouping default_to_square image_seq_length num_additional_image_tokens
        patch_size do_rand_resize_crop aspect_ratio_setting pad_size size_divisor
        """
    ),
)
# processor_config.json of transformers' LlavaProcessor and LlavaNextProcessor
HF_PROCESSOR_KEYS = Keys(
    {
        "patch_size": _SIDE,
        "vision_feature_select_strategy": choice("default", "full"),
        "num_additional_image_tokens": choice(1, because="CLIP's class token"),
    },
    {},
    key_names("auto_map chat_template image_processor image_token processor_class tokenizer video_processor"),
)
_SIZE_KEYS = Keys({"height": _SIDE, "width": _SIDE, "shortest_edge": _SIDE})


def _declared(directory: Path) -> tuple[dict[str, Any], str] | None:
    """What a directory declares about pictures, and the file; None if it declares nothing.

    | file                                          | written by            |
    |-----------------------------------------------|-----------------------|
    | preprocessor_config.json                      | transformers 4        |
    | processor/eval/..., processor/train/...       | PaddleMIX             |
    | "image_processor" in processor_config.json    | transformers 5        |
    """
    for place in (directory, directory / "processor" / "eval", directory / "processor" / "train"):
        if (place / PREPROCESSOR_FILE).is_file():
            return read_json(place / PREPROCESSOR_FILE), str(place / PREPROCESSOR_FILE)
    path = directory / PROCESSOR_FILE
    inner = read_json(path).get("image_processor") if path.is_file() else None
    return None if inner is None else (inner, f"{path}: image_processor")


def read_pixels(directory: Path) -> dict[str, Any]:
    """Processor values as far as a directory's `preprocessor_config.json` has them; empty without the file.

    Returns:
        Any of `image_mean`, `image_std`, `image_size`, `image_aspect_ratio` and `image_grid_pinpoints` as the file
        writes them; of `PIXEL_OPTIONS` those that differ from CLIP's.

    Raises:
        UserError: a value is not allowed, or asks for something that is not supported.
    """
    declared = _declared(directory)
    if declared is None:
        return {}
    values, where = declared
    found = take(values, KEYS, where)
    try:
        return _pixels(found)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def unpadded(directory: Path) -> tuple[str, str] | None:
    """What transformers does with an oblong picture if a directory's files tell it not to pad: crop or squeeze it.

    Returns:
        The file and what it does, "crops pictures to their centre"; None if it pads or without such a file.
    """
    declared = _declared(directory)
    if declared is None:
        return None
    found = take(declared[0], KEYS, declared[1], tell=False)
    # CLIPImageProcessor does not read do_pad; the others cut a picture into tiles
    kind = found.get("image_processor_type", "CLIPImageProcessor")
    if not kind.startswith("CLIP") and (not kind.startswith("LlavaImage") or found.get("do_pad", False)):
        return None
    crops = found.get("do_center_crop", True)
    return declared[1], "crops pictures to their centre" if crops else "squeezes pictures into a square"


def _pixels(found: Mapping[str, Any]) -> dict[str, Any]:
    values = {key: found[key] for key in ("image_mean", "image_std", "image_grid_pinpoints") if key in found}
    tile, resized = _tile_and_size(found)
    if tile is not None:
        values["image_size"] = tile
    # only this class pads to a square, and only if do_pad is set
    kind = found.get("image_processor_type", "")
    if kind.startswith("LlavaImageProcessor") and "do_pad" in found:
        values["image_aspect_ratio"] = "pad" if found["do_pad"] else "square"
    # value, CLIP's own: only what differs is kept, so that a processor file stays short
    options = {
        "size": (resized, None),
        "resample": (found.get("resample"), 3),
        "rescale_factor": (found.get("rescale_factor") if found.get("do_rescale", True) else 1.0, 1 / 255),
        "do_normalize": (found.get("do_normalize"), True),
    }
    return values | {key: value for key, (value, usual) in options.items() if value is not None and value != usual}


def _tile_and_size(found: Mapping[str, Any]) -> tuple[int | None, dict[str, int] | None]:
    """Side of a tile, and the size that pictures are resized to if it differs, as a file writes it."""
    # resize to `size`, then crop the centre to `crop_size`, as CLIPImageProcessor does
    crop, size = _sides(found.get("crop_size"), "crop_size"), _sides(found.get("size"), "size")
    both = "height" in size
    # with both sides a picture becomes a square at once, with the shortest edge only after the crop
    side = size.get("height") or size.get("shortest_edge")
    if not found.get("do_center_crop", True):
        if not both:
            raise UserError(
                f"do_center_crop is false with size {size or 'missing'}, so that pictures would not be square; "
                'supported: true, or a size with equal "height" and "width"'
            )
        crop = size
    tile = crop.get("height") or crop.get("shortest_edge") or side
    return tile, size if size and (both or side != tile) else None


def _sides(value: Any, key: str) -> dict[str, int]:
    """A size as transformers reads it: a number is the short side."""
    if value is None:
        return {}
    # an oblong target is refused: the tower reads squares
    sides = {"shortest_edge": value} if isinstance(value, int) else take(value, _SIZE_KEYS, key, tell=False)
    if sides.keys() not in ({"shortest_edge"}, {"height", "width"}) or sides.get("height") != sides.get("width"):
        raise UserError(f'{key} is {value}; supported: a number, "shortest_edge", or equal "height" and "width"')
    return sides


def check_hf_processor(directory: Path, patch_size: int, strategy: str) -> None:
    """Checks that a llava-hf processor counts as many tokens for a picture as its model has features.

    Args:
        patch_size, strategy: as in config.json.

    Raises:
        UserError: `processor_config.json` differs, or has a value that is not supported.
    """
    path = directory / PROCESSOR_FILE
    if not path.is_file():
        return
    found = take(read_json(path), HF_PROCESSOR_KEYS, str(path))
    for key, value in {"patch_size": patch_size, "vision_feature_select_strategy": strategy}.items():
        if found.get(key, value) != value:
            raise UserError(f"{path}: {key} is {found[key]!r}, but config.json has {value!r}")


def same_pinpoints(in_config: Any, in_preprocessor: Any) -> dict[str, Any]:
    """The grids that both files name: one decides the tiles, the other the order of their features.

    Raises:
        UserError: they differ.
    """
    # order may differ: ties between grids are decided by the list of config.json
    lists = [value for value in (in_config, in_preprocessor) if isinstance(value, list)]
    if len(lists) == 2 and sorted(lists[0]) != sorted(lists[1]):
        raise UserError(f"image_grid_pinpoints {lists[0]} is not what {PREPROCESSOR_FILE} has, {lists[1]}")
    value = in_config if in_config is not None else in_preprocessor
    return {"image_grid_pinpoints": value}


def exchange_sides(pinpoints: Any) -> list[list[int]] | None:
    """Grids of llava-hf, (height, width), as ours, (width, height), or back.

    A list that holds every grid both ways, as LLaVA-1.6's does, stays as it is: llava-hf's files copied it unchanged,
    and its order decides ties.
    """
    if pinpoints is None:
        return None
    if isinstance(pinpoints, str):
        pinpoints = [list(pair) for pair in parse_pinpoints(pinpoints, 1)]
    turned = [[second, first] for first, second in pinpoints]
    same = sorted(turned) == sorted([first, second] for first, second in pinpoints)
    return [list(pinpoint) for pinpoint in pinpoints] if same else turned
