"""Images to tiles, and tiles to visual tokens: how many there are and in which order, from sizes alone.

`count_visual_tokens`, `visual_token_index` and `image_tiles` share one layout function, so the number that is counted,
the rows that are gathered and the pixels that are encoded cannot disagree.  Knows no file, no model and no tokenizer.

Source: haotian-liu/LLaVA llava/mm_utils.py and llava/model/llava_arch.py (commit c121f04); CLIPImageProcessor of
transformers for resize, crop and normalisation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from paddlemix.errors import UserError, did_you_mean
from paddlemix.processors.resample import FILTERS, resize_shortest_and_crop
from paddlemix.sample import NEWLINE_INDEX

ASPECT_MODES = ("square", "pad", "anyres")
MERGE_TYPES = ("flat", "spatial", "spatial_unpad")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Source: InternViT's preprocessor_config.json; the means and deviations of ImageNet's pictures
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_MOST_TILES = 64  # along one side of a grid
_GRID = re.compile(r"\((\d{1,9})x(\d{1,9})\)")
_RANGE = re.compile(r"\(\d{1,9}x\d{1,9}\)(,(\.\.\.|\(\d{1,9}x\d{1,9}\)))*")
_PAIR = re.compile(r"[\[(](\d{1,9}),(\d{1,9})[\])]")
_PAIRS = re.compile(r"[\[(]([\[(]\d{1,9},\d{1,9}[\])],?)+[\])]")
# (width, height) in pixels; the first listed wins a tie. Source: LLaVA-1.6 checkpoints' config.json
LLAVA_16_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """What declared data says about a model's images.

    Args:
        tile_size: side of the square that the vision tower sees, pixels, a multiple of `patch_size`.
        patch_size: side of one patch, pixels.
        aspect_mode: "square" (resize the short side, centre crop), "pad" (to a square of the mean colour) or "anyres"
            (the whole image plus a grid of tiles).
        grid_pinpoints: allowed grids for "anyres" as (width, height), pixels.
        merge_type: order of an "anyres" image's tokens: "flat" tile after tile, "spatial" row by row over the grid,
            "spatial_unpad" the same without padding and with a newline vector behind each row.
        mean, std: per channel, of values in 0..1.
        resize_to: side that pictures have before the centre of a tile's size is cut out, pixels; None: `tile_size`.
        squash: in the mode "square", resize both sides, not the short one.
        resample: Pillow's number of the filter, 1 (Lanczos), 2 (bilinear) or 3 (bicubic).
        rescale_factor: what bytes are multiplied by before mean and deviation.
        normalise: whether mean and deviation are applied; the mean is also the colour of padding.
        cls_token: each tile gives its class token before its patches ("cls_patch").
    """

    tile_size: int = 336
    patch_size: int = 14
    aspect_mode: str = "pad"
    grid_pinpoints: tuple[tuple[int, int], ...] = ()
    merge_type: str = "flat"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resize_to: int | None = None
    squash: bool = False
    resample: int = 3
    rescale_factor: float = 1 / 255
    normalise: bool = True
    cls_token: bool = False

    def __post_init__(self) -> None:
        check_aspect_mode(self.aspect_mode)
        _check_choice("mm_patch_merge_type", self.merge_type, MERGE_TYPES)
        if self.tile_size < self.patch_size or self.patch_size < 1:
            raise UserError(f"image size {self.tile_size} is smaller than one patch of {self.patch_size} pixels")
        if len(self.mean) != 3 or len(self.std) != 3 or 0 in self.std or not np.isfinite([*self.mean, *self.std]).all():
            raise UserError(
                f"image_mean {list(self.mean)} and image_std {list(self.std)}: expected three numbers each, "
                "one per channel, and no deviation of 0"
            )
        self._check_resize()
        if self.aspect_mode == "anyres":
            self._check_grid()

    def _check_resize(self) -> None:
        if self.resample not in FILTERS:
            raise UserError(f"resample {self.resample} is not one of {', '.join(map(str, FILTERS))}")
        if self.resized_side < self.tile_size:
            raise UserError(f"size {self.resized_side} is smaller than the {self.tile_size} pixels that are cut out")
        if self.aspect_mode == "anyres" and self.resized_side != self.tile_size:
            raise UserError(
                f"size {self.resized_side} unlike crop_size {self.tile_size} is not supported with image_aspect_ratio "
                "'anyres'; supported: equal ones"
            )

    def _check_grid(self) -> None:
        if not self.grid_pinpoints:
            raise UserError(
                "image_aspect_ratio 'anyres' needs image_grid_pinpoints, a list of [width, height] in pixels"
            )
        for width, height in self.grid_pinpoints:
            if width % self.tile_size or height % self.tile_size or min(width, height) < 1:
                raise UserError(
                    f"image_grid_pinpoints [{width}, {height}] is not a multiple of the image size {self.tile_size}"
                )
        if self.cls_token and self.merge_type != "flat":
            raise UserError(
                f"mm_patch_merge_type '{self.merge_type}' has no place for class tokens; "
                "use mm_vision_select_feature 'patch'"
            )

    @property
    def resized_side(self) -> int:
        """Side of a picture before its centre is cut out, pixels."""
        return self.tile_size if self.resize_to is None else self.resize_to

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a tile."""
        return self.tile_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """Feature rows that the tower gives for one tile."""
        return self.patches_per_side**2 + int(self.cls_token)

    @cached_property
    def _normalisation(self) -> np.ndarray:
        """float32 [3, 256]: normalised value of each byte in each channel."""
        scaled = (np.arange(256, dtype=np.float64)[:, None] * self.rescale_factor).astype(np.float32)
        if not self.normalise:
            return np.ascontiguousarray(np.broadcast_to(scaled, (256, 3)).T)
        table = (scaled - np.array(self.mean, dtype=np.float32)) / np.array(self.std, dtype=np.float32)
        return np.ascontiguousarray(table.T)


def check_aspect_mode(value: str) -> None:
    """Whether a mode is one of `ASPECT_MODES`.

    Raises:
        UserError: it is not.  LLaVA-NeXT's "anyres_max_N" looks like "anyres" and is another computation, so that no
            advice may lead from one to the other.
    """
    if value.startswith("anyres_") or value == "highres":
        raise UserError(
            f"image_aspect_ratio='{value}' is not one of {', '.join(ASPECT_MODES)}, and none of them computes what it "
            "does, 'anyres' neither: a model that was trained so is not supported"
        )
    _check_choice("image_aspect_ratio", value, ASPECT_MODES)


def parse_pinpoints(value: str | Sequence[Sequence[int]] | None, tile_size: int) -> tuple[tuple[int, int], ...]:
    """The allowed grids of "anyres" in any of the forms that files have.

    Args:
        value: pairs (width, height) in pixels; such a list as text, as LLaVA's trainer writes it; or LLaVA-NeXT's
            "(1x1),...,(3x3)": all grids from the first to the last, in tiles.
        tile_size: pixels.

    Raises:
        UserError: it is none of these.

    Source: LLaVA-NeXT llava/mm_utils.py, process_anyres_image.
    """
    if value is None or not isinstance(value, str):
        return tuple((int(width), int(height)) for width, height in value or ())
    plain = "".join(value.split())
    if _RANGE.fullmatch(plain):
        grids = [(int(across), int(down)) for across, down in _GRID.findall(plain)]
        (first_across, first_down), (last_across, last_down) = grids[0], grids[-1]
        if 1 <= first_across <= last_across <= _MOST_TILES and 1 <= first_down <= last_down <= _MOST_TILES:
            return tuple(
                (across * tile_size, down * tile_size)
                for across in range(first_across, last_across + 1)
                for down in range(first_down, last_down + 1)
            )
    elif _PAIRS.fullmatch(plain):
        return tuple((int(width), int(height)) for width, height in _PAIR.findall(plain))
    raise UserError(
        f"image_grid_pinpoints {value[:60]!r} is not a list of [width, height] in pixels, nor (1x1),...,(NxN) in tiles "
        f"with N up to {_MOST_TILES}"
    )


def _check_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{key}='{value}' is not one of {', '.join(allowed)}{did_you_mean(value, allowed)}")


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise UserError(f"image size {width}x{height}: both sides must be at least 1 pixel")


def best_resolution(width: int, height: int, spec: ImageSpec) -> tuple[int, int]:
    """The allowed grid that keeps most of an image: largest effective resolution, then least waste, then first listed.

    Args:
        width, height: original image size, pixels, >= 1.

    Returns:
        (width, height) in pixels, one of `spec.grid_pinpoints`.
    """
    _check_size(width, height)
    best, best_effective, best_wasted = spec.grid_pinpoints[0], 0, math.inf
    for grid_width, grid_height in spec.grid_pinpoints:
        scale = min(grid_width / width, grid_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        wasted = grid_width * grid_height - effective
        if effective > best_effective or (effective == best_effective and wasted < best_wasted):
            best, best_effective, best_wasted = (grid_width, grid_height), effective, wasted
    return best


def grid_shape(width: int, height: int, spec: ImageSpec) -> tuple[int, int]:
    """Tiles across and down, (1, 1) for modes other than "anyres"."""
    if spec.aspect_mode != "anyres":
        return 1, 1
    grid_width, grid_height = best_resolution(width, height, spec)
    return grid_width // spec.tile_size, grid_height // spec.tile_size


def count_tiles(width: int, height: int, spec: ImageSpec) -> int:
    """Tiles that one image becomes: 1, or for "anyres" the whole image and its grid.

    Raises:
        UserError: a side is 0.
    """
    _check_size(width, height)
    if spec.aspect_mode != "anyres":
        return 1
    across, down = grid_shape(width, height, spec)
    return 1 + across * down


def count_visual_tokens(width: int, height: int, spec: ImageSpec) -> int:
    """Number of language-model positions that one image takes.

    Args:
        width, height: original image size, pixels, >= 1.

    Returns:
        576 for LLaVA-1.5; 576 to 2,928 for LLaVA-1.6 at 336 px.

    Raises:
        UserError: a side is 0.

    Source: LLaVA-NeXT blog, "Dynamic High Resolution".
    """
    if spec.aspect_mode != "anyres" or spec.merge_type != "spatial_unpad":
        return count_tiles(width, height, spec) * spec.tokens_per_tile
    rows, columns = _kept_cells(width, height, spec)
    return spec.tokens_per_tile + (rows.stop - rows.start) * (columns.stop - columns.start + 1)


def visual_token_index(width: int, height: int, spec: ImageSpec) -> np.ndarray:
    """The feature row that stands at each visual token of one image.

    Args:
        width, height: original image size, pixels, >= 1.

    Returns:
        int64 [T] with values in 0 .. tiles * tokens_per_tile - 1, and `NEWLINE_INDEX` at row ends; T equals
        `count_visual_tokens`.
    """
    per_tile = spec.tokens_per_tile
    if spec.aspect_mode != "anyres" or spec.merge_type == "flat":
        return np.arange(count_tiles(width, height, spec) * per_tile, dtype=np.int64)
    across, down = grid_shape(width, height, spec)
    side = spec.patches_per_side
    grid = np.arange(across * down * per_tile, dtype=np.int64).reshape(down, across, side, side)
    grid = per_tile + grid.transpose(0, 2, 1, 3).reshape(down * side, across * side)  # tile rows become image rows
    whole = np.arange(per_tile, dtype=np.int64)
    if spec.merge_type == "spatial":
        return np.concatenate([whole, grid.reshape(-1)])
    rows, columns = _kept_cells(width, height, spec)
    kept = grid[rows, columns]
    newline = np.full((kept.shape[0], 1), NEWLINE_INDEX, dtype=np.int64)
    return np.concatenate([whole, np.concatenate([kept, newline], axis=1).reshape(-1)])


def _kept_cells(width: int, height: int, spec: ImageSpec) -> tuple[slice, slice]:
    """Rows and columns of the grid's patch cells that hold image rather than padding.

    The order of the floating-point operations is the reference's: other orders differ at sizes such as 328x205."""
    across, down = grid_shape(width, height, spec)
    grid_width, grid_height = across * spec.patches_per_side, down * spec.patches_per_side
    if width / height > grid_width / grid_height:
        padding = (grid_height - int(height * (grid_width / width))) // 2
        return slice(padding, grid_height - padding), slice(0, grid_width)
    padding = (grid_width - int(width * (grid_height / height))) // 2
    return slice(0, grid_height), slice(padding, grid_width - padding)


def image_tiles(image: Image.Image, spec: ImageSpec) -> list[Image.Image]:
    """Cuts an image into what the tower sees.

    Args:
        image: RGB, any size from 1x1.

    Returns:
        RGB images of `tile_size` squared; the whole image first, then the grid row by row.
    """
    size, resample = spec.tile_size, FILTERS[spec.resample]
    if spec.aspect_mode == "square" and spec.squash:
        return [_centre(image.resize((spec.resized_side, spec.resized_side), resample), size)]
    if spec.aspect_mode == "square":
        return [resize_shortest_and_crop(image, spec.resized_side, size, resample)]
    if spec.aspect_mode == "pad":
        return [_centre(_pad_and_resize(image, spec), size)]
    padded = _fit_into(image, best_resolution(*image.size, spec), resample)
    boxes = [
        (left, top, left + size, top + size)
        for top in range(0, padded.height, size)
        for left in range(0, padded.width, size)
    ]
    return [image.resize((size, size), resample), *(padded.crop(box) for box in boxes)]


def _centre(image: Image.Image, size: int) -> Image.Image:
    """The middle of a square."""
    start = (image.width - size) // 2
    return image if image.width == size else image.crop((start, start, start + size, start + size))


def _pad_and_resize(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """A square of the mean colour with the image in its centre, resized."""
    size, side, resample = spec.resized_side, max(image.size), FILTERS[spec.resample]
    colour = tuple(int(value * 255) for value in spec.mean)
    offset = ((side - image.width) // 2, (side - image.height) // 2)
    if image.width > image.height:
        # Pillow resizes across, then down: across, the padding stays of one colour and needs no work.
        row = Image.new("RGB", (side, 1), colour).resize((size, 1), resample)
        canvas = Image.new("RGB", (size, side), row.getpixel((0, 0)))
        canvas.paste(image.resize((size, image.height), resample), (0, offset[1]))
    else:
        canvas = Image.new("RGB", (side, side), colour)
        canvas.paste(image, offset)
    return canvas.resize((size, size), resample)


def _fit_into(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """Resizes to fit and centres on black."""
    scale_x, scale_y = size[0] / image.width, size[1] / image.height
    if scale_x < scale_y:
        fitted = (size[0], min(math.ceil(image.height * scale_x), size[1]))
    else:
        fitted = (min(math.ceil(image.width * scale_y), size[0]), size[1])
    canvas = Image.new("RGB", size, (0, 0, 0))
    resized = image.resize(fitted, resample)
    canvas.paste(resized, ((size[0] - fitted[0]) // 2, (size[1] - fitted[1]) // 2))
    return canvas


def normalise_tiles(tiles: list[Image.Image], spec: ImageSpec) -> np.ndarray:
    """Pixels of tiles as the tower takes them.

    Returns:
        float32 [N, 3, tile_size, tile_size], channels first, (value / 255 - mean) / std as CLIP has it.
    """
    size = spec.tile_size
    normalised = np.empty((len(tiles), 3, size, size), dtype=np.float32)
    for tile, planes in zip(tiles, normalised, strict=True):
        for channel, plane in enumerate(tile.split()):
            # "clip" only spares numpy a check: no byte is beyond 255
            np.take(spec._normalisation[channel], np.asarray(plane), out=planes[channel], mode="clip")
    return normalised


def preprocess_image(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Tiles of one RGB image, normalised: float32 [N, 3, tile_size, tile_size]."""
    return normalise_tiles(image_tiles(image, spec), spec)
