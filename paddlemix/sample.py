"""The data at each stage, from the user's file to the model: read this file first.

    record (JSON) -> Sample -> Example -> Row -> Batch

Plain numpy and dataclasses; nothing here knows a tokenizer, a template, a file or paddle.
Shapes: B batch, L tokens, N tiles, P patches per tile, T visual tokens, S supervised positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

# Ids of no vocabulary: negative, so that no tokenizer can produce them and a forgotten one fails in the embedding.
IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_INDEX = -200  # Source: haotian-liu/LLaVA llava/constants.py
IGNORE_INDEX = -100  # label of a position that is not trained; same source
NEWLINE_INDEX = -1  # in Example.image_index: the learned end-of-row vector of LLaVA-1.6

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Box:
    """A place in an image; it becomes text once the image's size is known (`processors/images/boxes.py`).

    Args:
        image: index into `Sample.images`.
        corners: left, top, right, bottom; pixels of the upright image, or shares of its sides.
        normalised: whether `corners` are shares, 0..1.
    """

    image: int
    corners: tuple[float, float, float, float]
    normalised: bool = False


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation.

    Args:
        role: who speaks.
        content: text pieces in reading order and, as an integer, the index into `Sample.images` of an image between
            them, e.g. `(0, "\\nWhat is this?")`; a `Box` marks where its coordinates will be written.  Text is
            content: nothing in it is ever parsed again.
    """

    role: Role
    content: tuple[str | int | Box, ...]

    @property
    def text(self) -> str:
        """The text pieces joined, without images and boxes."""
        return "".join(piece for piece in self.content if isinstance(piece, str))

    @property
    def image_indices(self) -> tuple[int, ...]:
        """Indices into `Sample.images`, in reading order."""
        return tuple(piece for piece in self.content if isinstance(piece, int))


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One training record after parsing, before tokenising.

    Args:
        messages: the turns; a leading system turn is allowed, then user and assistant alternate.
        images: path, http(s) URL or `data:` URI of each image, in the order in which `Message.content` counts them.
        source: where it came from, for error messages: "train.json record 17".
    """

    messages: tuple[Message, ...]
    images: tuple[str, ...]
    source: str


@dataclass(frozen=True, kw_only=True)
class Example:
    """One encoded sample.

    Args:
        input_ids: int64 [L]; every visual token is `IMAGE_TOKEN_INDEX`.
        labels: int64 [L]; the id itself where it is trained, else `IGNORE_INDEX`.
        pixel_values: float32 [N, 3, H, W], all tiles of all images, in order; N may be 0.
        image_index: int64 [T]; for the t-th `IMAGE_TOKEN_INDEX` of `input_ids` the row of the flattened tile features
            [N * P] at that position, or `NEWLINE_INDEX`.
        source: see `Sample`.
        tile_features: float32 [N, P, C] of the vision tower, in place of `pixel_values`, which then has no rows.
        tile_keys: for each image of `pixel_values` the name under which its features are kept, and its tiles.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    pixel_values: np.ndarray
    image_index: np.ndarray
    source: str = ""
    tile_features: np.ndarray | None = None
    tile_keys: tuple[tuple[str, int], ...] = ()

    @property
    def num_tiles(self) -> int:
        """Tiles, as pixels or as features."""
        return len(self.pixel_values) if self.tile_features is None else len(self.tile_features)

    @property
    def num_supervised(self) -> int:
        """Positions that are trained."""
        return int((self.labels != IGNORE_INDEX).sum())


@dataclass(frozen=True)
class Skip:
    """A sample that was left out because the user asked for that.

    Args:
        index: its number in the data set.
        reason: why; begins with the sample's source.
        too_long: left out by `on_too_long`, so that it does not count as bad.
    """

    index: int
    reason: str
    too_long: bool = False


@dataclass(frozen=True)
class Row:
    """One row of a batch: a single example, or several that were packed.

    Args:
        examples: in order; empty where all were skipped.
        skipped: the samples that should have been here too.
    """

    examples: tuple[Example, ...]
    skipped: tuple[Skip, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The inputs of one forward pass; all arithmetic on positions is already done.

    Args:
        input_ids: int64 [B, L]; 0 for visual tokens and padding.
        position_ids: int64 [B, L]; restarts at 0 with every sample of a row.
        segment_ids: int64 [B, L]; 1, 2, ... for the samples of a row, 0 for padding.
        pixel_values: float32 [N, 3, H, W] or None when the batch has no image; tiles of padding come last.
        tile_features: float32 [M, P, C] of tiles that the tower has already processed, or None.
        tile_keys: see `Example`; of `pixel_values`, in order.
        tile_order: int64 [N+M] where there are both pixels and features, else None: for each tile of the samples its
            row in concat(features of `pixel_values`, `tile_features`).
        merge_index: int64 [B * L] or None without image; row of concat(token embeddings [B*L], features of the samples'
            tiles [(N+M)*P], newline [1]) for each position.
        loss_index: int64 [S]; flat positions (b * L + l) whose next token is trained.
        loss_targets: int64 [S]; those next tokens.
        sources: one per sample, for error messages.
        num_visual: positions that hold a visual token.
        skipped: samples that were left out of this batch.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    segment_ids: np.ndarray
    pixel_values: np.ndarray | None
    merge_index: np.ndarray | None
    loss_index: np.ndarray
    loss_targets: np.ndarray
    sources: tuple[str, ...] = ()
    num_visual: int = 0
    tile_features: np.ndarray | None = None
    tile_keys: tuple[tuple[str, int], ...] = ()
    tile_order: np.ndarray | None = None
    skipped: tuple[Skip, ...] = ()
