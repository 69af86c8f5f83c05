"""Boxes -> text: coordinates in the picture that the model sees, as LLaVA's training data writes them.

    Box(0, (64, 48, 320, 240)) in an image of 640 x 480, "pad"  ->  "[0.1, 0.2, 0.5, 0.5]"

Knows no file format and no tokenizer.

Source: LLaVA-1.5's instruction data (llava_v1_5_mix665k.json: RefCOCO, Visual Genome): left, top, right, bottom as
shares of the sides, rounded to two decimals; with images padded to a square, shares of that square.
"""

from __future__ import annotations

from collections.abc import Sequence

from paddlemix.errors import UserError
from paddlemix.processors.images.image_spec import ImageSpec
from paddlemix.sample import Box, Message

_DECIMALS = 2
_TOLERANCE = 1.0  # pixels that a box may exceed its image by, as rounded annotations do


def write_boxes(messages: Sequence[Message], sizes: Sequence[tuple[int, int]], spec: ImageSpec) -> Sequence[Message]:
    """Messages with every box as text.

    Args:
        sizes: (width, height) of each image that boxes name, pixels of the upright image.
        spec: how the model sees images.

    Returns:
        The same messages where none has a box.

    Raises:
        UserError: a box lies outside of its image, or wholly outside of what the model sees of it.
    """
    if not any(isinstance(piece, Box) for message in messages for piece in message.content):
        return messages
    return tuple(
        Message(
            role=message.role,
            content=tuple(
                box_text(piece, sizes[piece.image], spec) if isinstance(piece, Box) else piece
                for piece in message.content
            ),
        )
        for message in messages
    )


def box_text(box: Box, size: tuple[int, int], spec: ImageSpec) -> str:
    """The text of one box.

    Args:
        box: its corners.
        size: (width, height) of its image, pixels.

    Returns:
        "[left, top, right, bottom]", each 0..1: shares of the padded square for "pad", of the image itself for "anyres"
        and of the centre crop for "square", cut off at its edges.

    Raises:
        UserError: see `write_boxes`.
    """
    width, height = size
    left, top, right, bottom = box.corners
    if box.normalised:
        left, top, right, bottom = left * width, top * height, right * width, bottom * height
    if min(left, top) < -_TOLERANCE or right > width + _TOLERANCE or bottom > height + _TOLERANCE:
        unit = "as shares of its sides" if box.normalised else "in pixels"
        raise UserError(
            f"the box {list(box.corners)} ({unit}) lies outside of image {box.image}, {width}x{height} pixels upright"
        )
    # in the picture that the model sees: padded or cropped, its sides differ from the file's
    left, right = (_share(value, width, height, spec) for value in (left, right))
    top, bottom = (_share(value, height, width, spec) for value in (top, bottom))
    # partly visible boxes are cut off at the edge, as the picture is
    if min(right, bottom) < 0 or max(left, top) > 1:
        raise UserError(
            f"the box {list(box.corners)} lies outside of the centre of image {box.image} ({width}x{height}) that "
            f"image_aspect_ratio '{spec.aspect_mode}' shows to the model"
        )
    return "[" + ", ".join(repr(_rounded(value)) for value in (left, top, right, bottom)) + "]"


def _share(position: float, side: int, other: int, spec: ImageSpec) -> float:
    """A position along one side, pixels, as a share of what the model sees; outside of 0..1 where it is cut away.

    Args:
        side: length of that side, pixels.
        other: length of the other one.
    """
    if spec.aspect_mode == "anyres":
        return position / side
    if spec.aspect_mode == "pad":  # the offset as in `tiles.py`
        square = max(side, other)
        return (position + (square - side) // 2) / square
    if side <= other:
        return position / side
    resized = int(spec.tile_size * side / other)  # sizes and offset as in resample.py
    return (position * resized / side - (resized - spec.tile_size) // 2) / spec.tile_size


def _rounded(share: float) -> float:
    return abs(round(min(max(share, 0.0), 1.0), _DECIMALS))  # no "-0.0"
