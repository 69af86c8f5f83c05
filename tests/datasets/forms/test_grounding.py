"""Grounding: boxes and references at their places, and errors where they do not fit."""

from __future__ import annotations

import re
from typing import Any

import pytest

from paddlemix.datasets.forms.parse import parse_record
from paddlemix.errors import UserError
from paddlemix.sample import Box, Sample


def parse(question: str, answer: str, objects: Any, images: tuple[str, ...] = ("a.png",)) -> Sample:
    record = {"query": question, "response": answer, "images": list(images), "objects": objects}
    return parse_record(record, "train.json record 3")


def test_places_are_filled_in_reading_order() -> None:
    objects = {"ref": ["a dog", "<bbox> cat"], "bbox": [[1, 2, 3, 4], [5.5, 6, 7, 8]]}
    sample = parse("<image>Find <ref-object> and <ref-object>", "<bbox><bbox> here", objects)
    assert sample.messages[0].content == (0, "Find ", "a dog", " and ", "<bbox> cat")
    assert sample.messages[1].content == (Box(0, (1, 2, 3, 4)), Box(0, (5.5, 6, 7, 8)), " here")


def test_shares_and_images() -> None:
    objects = {"bbox": [[0.1, 0.2, 0.3, 0.4]], "bbox_type": "norm1", "image_id": [1]}
    sample = parse("What is at <bbox>?", "A dog", objects, ("a.png", "b.png"))
    assert sample.messages[0].content == (0, 1, "What is at ", Box(1, (0.1, 0.2, 0.3, 0.4), normalised=True), "?")


@pytest.mark.parametrize("objects", [None, {}, []])
def test_without_objects_the_places_are_text(objects: Any) -> None:
    assert parse("Q <bbox>", "<ref-object>", objects).messages[1].content == ("<ref-object>",)


BOX = [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ([BOX], "objects is [[1, 2, 3, 4]], expected an object with ref, bbox, bbox_type, image_id"),
        ({"bbox": [BOX], "label": []}, "objects has the key 'label', allowed: ref"),
        ({"bbox": BOX}, "objects.bbox 1: expected four numbers"),
        ({"bbox": "1,2,3,4"}, 'objects.bbox is "1,2,3,4", expected a list'),
        ({"bbox": [[1, 2]]}, "objects.bbox [1, 2]: expected four numbers, left, top, right, bottom; points are not"),
        ({"bbox": [[1, 2, 3, "4"]]}, "expected four numbers"),
        ({"bbox": [[1, 2, 3, True]]}, "expected four numbers"),
        ({"bbox": [[1, 2, 3, float("nan")]]}, "expected four numbers"),
        ({"bbox": [[3, 2, 1, 4]]}, "objects.bbox [3, 2, 1, 4]: expected left <= right and top <= bottom"),
        ({"bbox": [[1, 4, 3, 2]]}, "expected left <= right"),
        ({"bbox": [BOX], "bbox_type": "norm1000"}, 'objects.bbox_type "norm1000" is not one of real, norm1'),
        ({"bbox": [BOX], "image_id": [0, 0]}, "objects has 1 bbox and 2 image_id"),
        ({"bbox": [BOX], "image_id": [1]}, "objects.image_id 1 of a bbox is none of the record's 1 images"),
        ({"bbox": [BOX], "image_id": [True]}, "objects.image_id true of a bbox"),
        ({"ref": [3]}, "objects.ref is [3], expected texts"),
        ({"ref": [" "], "bbox": [BOX]}, 'objects.ref is [" "], expected texts, none of them empty'),
        ({"bbox": [BOX, BOX]}, "1 <bbox> in the texts but 2 in objects.bbox; each needs one <bbox>"),
        ({"bbox": [BOX], "ref": ["a"]}, "0 <ref-object> in the texts but 1 in objects.ref"),
        ({"ref": [], "bbox_type": "real"}, "1 <bbox> in the texts but 0 in objects.bbox"),
    ],
)
def test_objects_that_cannot_be_used(objects: Any, message: str) -> None:
    with pytest.raises(UserError, match="^train.json record 3: .*" + re.escape(message)):
        parse("<image>Where?", "<bbox>", objects)


def test_a_box_needs_an_image() -> None:
    with pytest.raises(UserError, match="image_id 0 of a bbox is none of the record's 0 images"):
        parse("Where?", "<bbox>", {"bbox": [BOX]}, ())
