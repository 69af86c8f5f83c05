"""Records of a data file -> Samples.

The form of a conversation is recognised record by record (`dialects.py`); here its images and boxes are placed and its
turns checked.  Knows no template and opens no image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paddlemix.datasets.forms.annotations import FORM_READERS
from paddlemix.datasets.forms.dialects import read_open_turns, read_turns
from paddlemix.datasets.forms.grounding import place_objects, read_objects
from paddlemix.datasets.forms.image_keys import PlacedImage, image_addresses, locate
from paddlemix.datasets.forms.turns import Turn
from paddlemix.errors import UserError
from paddlemix.sample import IMAGE_TOKEN, Message, Sample

FORMS = ("chatml_dataset", *FORM_READERS)  # names of PaddleMIX's data sets; of the first the records tell their form


def parse_record(
    record: dict[str, Any], source: str, image_root: str | Path | None = None, form: str | None = None
) -> Sample:
    """Turns one record of any known form into a Sample.

    Args:
        record: a conversation as `conversations`, `messages` or `query` with `response`; where images are used, `image`
            or `images` (an address, an object with `path` or `url`, or a list of them) or parts of its messages; and
            perhaps `system` and `objects`.  Keys that mean nothing here are passed over.
        source: where the record is, e.g. "train.json record 17"; begins every error.
        image_root: folder that relative image paths start from; None for the working directory.
        form: `name` of the data set: coco_caption and vg_caption read `image` and `caption`, coco_vqa reads `image`,
            `question` and `answer`; any other leaves it to the record.

    Returns:
        A Sample whose messages name each of its images exactly once, in reading order.

    Raises:
        UserError: the record is of no known form or of two, has what is not supported (tool calls, videos, preference
            pairs), its roles are out of order, an answer is empty, a text is not Unicode, or places and images, or
            places and boxes, are not equally many.
    """
    try:
        turns = read_turns(record, form)
        _check_turns(turns)
        return _place(turns, record, source, image_root)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def parse_question(
    record: dict[str, Any], source: str, image_root: str | Path | None = None, form: str | None = None
) -> Sample:
    """Turns one record into a question for a model: any form of `parse_record`, or one of LLaVA's question files.

    Args:
        record: as for `parse_record`, its last answer may be missing or empty; or `text`, the question, with the images
            of `image` before it unless `<image>` in the text marks their places.
        source, image_root, form: see `parse_record`.

    Returns:
        A Sample that ends with the question or, where the record has one, with its reference answer.

    Raises:
        UserError: as `parse_record`.

    Source: haotian-liu/LLaVA llava/eval/model_vqa.py (commit c121f04).
    """
    try:
        turns = read_open_turns(record, form)
        _check_turns(turns, open_end=True)
        return _place(turns, record, source, image_root)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _place(turns: Sequence[Turn], record: dict[str, Any], source: str, image_root: str | Path | None) -> Sample:
    """The Sample of turns that were checked: with its images, and its boxes, in their places."""
    messages, images = _place_images(turns, image_addresses(record))
    # after the images: boxes name images by their number in reading order
    objects = read_objects(record, len(images))
    if objects is not None:
        messages = place_objects(messages, objects)
    for address in images:
        _check_unicode(address)
    return Sample(messages=messages, images=tuple(locate(path, image_root) for path in images), source=source)


def _check_turns(turns: Sequence[Turn], open_end: bool = False) -> None:
    for _, content in turns:
        for piece in content:
            if isinstance(piece, str):
                _check_unicode(piece)
    # only the first turn may be the system's; anywhere else it fails the alternation below
    first = 1 if turns[0][0] == "system" else 0
    for number, (role, content) in enumerate(turns[first:], 1):
        expected = "user" if number % 2 else "assistant"
        if role != expected:
            raise UserError(
                f"turn {number} is by the {role}, expected the {expected}: turns alternate, the user begins"
            )
        # nothing would be supervised but the end token: such a record teaches to stay silent
        if role == "assistant" and not any(isinstance(piece, str) and piece.strip() for piece in content):
            raise UserError(f"turn {number}: the answer is empty, so there is nothing to learn")
    count = len(turns) - first
    if not count or (count % 2 and not open_end):
        raise UserError(f"{count} turns: the last question has no answer, so there is nothing to learn from it")


def _check_unicode(text: str) -> None:
    try:
        # "\ud83d" is valid JSON and half a character: a tokenizer would fail on it hours later
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found, before = ascii(text[error.start]), text[max(0, error.start - 20) : error.start]
        raise UserError(f"half a character, {found}, follows the text {before!r}; write the whole one") from error


def _place_images(turns: Sequence[Turn], listed: Sequence[str]) -> tuple[tuple[Message, ...], list[str]]:
    """Messages with images counted in reading order, and the address of each."""
    images: list[str] = []
    messages, places, remaining = [], 0, iter(listed)
    for role, content in turns:
        placed: list[str | int] = []
        for piece in content:
            if not isinstance(piece, PlacedImage):
                placed += [piece] if piece else []
                continue
            places += piece.address is None
            placed.append(len(images))
            # an image with an address of its own does not use up one of the list
            images.append(piece.address if piece.address is not None else next(remaining, ""))
        messages.append(Message(role=role, content=tuple(placed)))
    if places != len(listed):
        raise UserError(
            f"{places} {IMAGE_TOKEN} in the questions but {len(listed)} in 'image'; each image needs one {IMAGE_TOKEN}"
        )
    return tuple(messages), images
