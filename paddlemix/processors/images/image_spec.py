"""What a checkpoint declares about its images: one `ImageSpec`, checked as a whole.

`visual_tokens.py` counts and orders tokens by it, `tiles.py` cuts pixels by it.  Knows no image and no file.

Source: haotian-liu/LLaVA llava/mm_utils.py (commit c121f04); CLIPImageProcessor of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from paddlemix.errors import UserError, did_you_mean
from paddlemix.processors.images.resample import FILTERS

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
            "spatial_unpad" the same without padding and with a newline vector after each row.
        mean, std: per channel, of values in 0..1.
        resize_to: side that pictures have before the centre of a tile's size is cut out, pixels; None: `tile_size`.
        squash: in the mode "square", resize both sides, not the short one.
        resample: Pillow's number of the filter, 1 (Lanczos), 2 (bilinear) or 3 (bicubic).
        rescale_factor: what bytes are multiplied by before mean and deviation.
        normalise: whether mean and deviation are applied; the mean is also the colour of padding.
        cls_token: each tile has its class token before its patches ("cls_patch").
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
        # the grid's tiles are cut edge to edge: a margin around each would overlap its neighbours
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
        # "spatial" merges are about the grid of patches, in which a class token has no place
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
        """Feature rows that the tower computes for one tile."""
        return self.patches_per_side**2 + int(self.cls_token)

    @cached_property
    def _normalisation(self) -> np.ndarray:
        """float32 [3, 256]: normalised value of each byte in each channel."""
        # One lookup for each byte instead of arithmetic for each pixel; in float32 as the reference computes it.
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
    # tried first, because "did you mean 'anyres'" would lead to a model that computes something else
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
    # "(1x1),...,(3x3)", in tiles -> every grid between the two
    # "[[336,672],...]", in pixels -> as listed
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
