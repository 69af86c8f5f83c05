"""Grounding: a record's `objects` fills the places `<bbox>` and `<ref-object>` of its texts.

    {"objects": {"ref": ["a dog"], "bbox": [[331, 76, 853, 159]]}, ...  "<ref-object><bbox> plays."

Boxes stay numbers here; `processors/images/boxes.py` writes them once the image's size is known.

Source: ms-swift docs, Custom-dataset, Grounding.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from paddlemix.errors import UserError
from paddlemix.sample import Box, Message

BOX_TOKEN, REF_TOKEN = "<bbox>", "<ref-object>"
_PLACES = re.compile(f"({BOX_TOKEN}|{REF_TOKEN})")
_KEYS = ("ref", "bbox", "bbox_type", "image_id")
# pixels of the original picture, or shares of its sides
_TYPES = {"real": False, "norm1": True}


@dataclass(frozen=True)
class Objects:
    """What fills the places, each in reading order.

    Args:
        refs: texts for `<ref-object>`.
        boxes: for `<bbox>`.
    """

    refs: tuple[str, ...]
    boxes: tuple[Box, ...]


def read_objects(record: Mapping[str, Any], image_count: int) -> Objects | None:
    """A record's `objects`; None where it is absent or empty, and then `<bbox>` is text like any other.

    Args:
        image_count: images of the record; `image_id` counts them in reading order, from 0.

    Raises:
        UserError: a key or value breaks the form's rules; a box's corners are not numbers or are in wrong order.
    """
    value = record.get("objects")
    if not value:
        return None
    if not isinstance(value, dict):
        raise UserError(f"objects is {_shown(value)}, expected an object with {', '.join(_KEYS)}")
    unknown = [key for key in value if key not in _KEYS]
    if unknown:
        raise UserError(f"objects has the key '{unknown[0]}', allowed: {', '.join(_KEYS)}")
    refs, boxes = _list(value, "ref"), _list(value, "bbox")
    if not all(isinstance(ref, str) and ref.strip() for ref in refs):
        raise UserError(f"objects.ref is {_shown(refs)}, expected texts, none of them empty")
    # null counts as absent: tables that were made into JSON have every key in every record
    kind = value.get("bbox_type") or "real"
    if kind not in _TYPES:
        raise UserError(f"objects.bbox_type {_shown(kind)} is not one of {', '.join(_TYPES)}")
    # a record of one image need not say which
    images = _list(value, "image_id") or [0] * len(boxes)
    if len(images) != len(boxes):
        raise UserError(f"objects has {len(boxes)} bbox and {len(images)} image_id; one for each bbox is needed")
    return Objects(
        tuple(refs),
        tuple(_box(box, image, image_count, _TYPES[kind]) for box, image in zip(boxes, images, strict=True)),
    )


def _list(value: Mapping[str, Any], key: str) -> list[Any]:
    items = value.get(key)
    if items is None:
        return []
    if not isinstance(items, list):
        raise UserError(f"objects.{key} is {_shown(items)}, expected a list")
    return items


def _box(corners: Any, image: Any, image_count: int, normalised: bool) -> Box:
    # bool is an int in Python, and NaN a float: neither is a corner
    numbers = isinstance(corners, list) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) for value in corners
    )
    if not numbers or len(corners) != 4:
        point = "; points are not supported" if numbers and len(corners) == 2 else ""
        raise UserError(f"objects.bbox {_shown(corners)}: expected four numbers, left, top, right, bottom{point}")
    left, top, right, bottom = corners
    if right < left or bottom < top:
        raise UserError(f"objects.bbox {_shown(corners)}: expected left <= right and top <= bottom")
    if not isinstance(image, int) or isinstance(image, bool) or not 0 <= image < image_count:
        raise UserError(f"objects.image_id {_shown(image)} of a bbox is none of the record's {image_count} images")
    return Box(image, (left, top, right, bottom), normalised)


def place_objects(messages: tuple[Message, ...], objects: Objects) -> tuple[Message, ...]:
    """The messages with texts and boxes at their places.

    Raises:
        UserError: there are not as many places as texts or boxes.
    """
    texts = [piece for message in messages for piece in message.content if isinstance(piece, str)]
    # counted before anything is filled: a missing box would shift all that follow to wrong places
    for token, key, given in ((REF_TOKEN, "ref", objects.refs), (BOX_TOKEN, "bbox", objects.boxes)):
        count = sum(text.count(token) for text in texts)
        if count != len(given):
            raise UserError(f"{count} {token} in the texts but {len(given)} in objects.{key}; each needs one {token}")
    refs, boxes = iter(objects.refs), iter(objects.boxes)
    return tuple(
        Message(role=message.role, content=tuple(_filled(message.content, refs, boxes))) for message in messages
    )


def _filled(
    content: tuple[str | int | Box, ...], refs: Iterator[str], boxes: Iterator[Box]
) -> Iterator[str | int | Box]:
    for piece in content:
        if not isinstance(piece, str):
            yield piece
            continue
        for part in _PLACES.split(piece):
            if part == BOX_TOKEN:
                yield next(boxes)
            elif part:
                yield next(refs) if part == REF_TOKEN else part


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:80]
