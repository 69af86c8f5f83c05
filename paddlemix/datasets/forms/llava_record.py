"""Samples -> records in LLaVA's form, the reverse of `parse.py`.

{"id": "0", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nQ"}, {"from": "gpt", ...}]}
"""

from __future__ import annotations

from typing import Any

from paddlemix.datasets.forms.grounding import BOX_TOKEN, REF_TOKEN
from paddlemix.errors import UserError
from paddlemix.sample import IMAGE_TOKEN, Box, Message, Sample

_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}


def llava_record(sample: Sample, identity: str) -> dict[str, Any]:
    """A sample as LLaVA's own data files have it; `parse_record` makes the same sample of it.

    Args:
        sample: its boxes become `objects`.
        identity: the record's `id`.

    Raises:
        UserError: a text holds `<image>`, or beside boxes `<bbox>`, as words, which the form cannot tell from places.
    """
    # a record has objects where any text has a box, and only then are `<bbox>` and `<ref-object>` places
    boxes = [piece for message in sample.messages for piece in message.content if isinstance(piece, Box)]
    record: dict[str, Any] = {"id": identity}
    if sample.images:
        record["image"] = sample.images[0] if len(sample.images) == 1 else list(sample.images)
    record["conversations"] = [
        {"from": _SPEAKERS[message.role], "value": _text(message, bool(boxes))} for message in sample.messages
    ]
    if boxes:
        record["objects"] = {
            # texts of `<ref-object>` were filled in when the record was read
            "ref": [],
            "bbox": [list(box.corners) for box in boxes],
            "bbox_type": "norm1" if boxes[0].normalised else "real",
            "image_id": [box.image for box in boxes],
        }
    return record


def _text(message: Message, with_boxes: bool) -> str:
    # `<image>` is a place in questions alone; `<bbox>` and `<ref-object>` are places only where a record has objects
    refused = [IMAGE_TOKEN] * (message.role == "user") + [BOX_TOKEN, REF_TOKEN] * with_boxes
    words = next((token for token in refused if token in message.text), None)
    if words is not None:
        raise UserError(f"a text of the {message.role} holds {words} as words, which LLaVA's form reads as a place")
    return "".join(
        piece if isinstance(piece, str) else IMAGE_TOKEN if isinstance(piece, int) else BOX_TOKEN
        for piece in message.content
    )
