"""What all forms share: roles, refused turns, places of images, annotation files, and the way back to LLaVA's form."""

from __future__ import annotations

from typing import Any

import pytest

from paddlemix.datasets.forms.annotations import FORM_READERS
from paddlemix.datasets.forms.dialects import is_bare_question, read_open_turns, read_turns
from paddlemix.datasets.forms.image_keys import PLACE, PlacedImage, folders_of, image_addresses, locate
from paddlemix.datasets.forms.llava_record import llava_record
from paddlemix.datasets.forms.parse import parse_record
from paddlemix.datasets.forms.turns import Turn, check_turn, images_first, role_of
from paddlemix.errors import UserError

OWN = PlacedImage("a.png")


@pytest.mark.parametrize(
    ("content", "images", "expected"),
    [
        (("Q",), 2, (PLACE, PLACE, "Q")),  # no place at all: all images before the question
        ((OWN, "Q"), 2, (OWN, "Q")),  # a part decides
        (("<|image|>A<|image|>B",), 2, (PLACE, "A", PLACE, "B")),  # tokens of another program, one for each image
        (("<|image|>Q",), 2, (PLACE, PLACE, "<|image|>Q")),  # too few of them: words
        (("Q",), 0, ("Q",)),
    ],
)
def test_where_images_go(content: tuple[Any, ...], images: int, expected: tuple[Any, ...]) -> None:
    turns: list[Turn] = [("system", ("S",)), ("user", content), ("assistant", ("A",))]
    found = images_first({"images": [f"{number}.png" for number in range(images)]}, turns)
    assert found == [turns[0], ("user", expected), turns[2]]


def test_roles_and_refused_turns() -> None:
    assert [role_of(name, "") for name in ("human", "gpt", "system")] == ["user", "assistant", "system"]
    with pytest.raises(UserError, match="from='tool' is not supported: tool calls are not trained here"):
        role_of("tool", "from=")
    with pytest.raises(UserError, match="'loss' false is not supported: every answer is trained"):
        check_turn({"role": "assistant", "loss": False}, 1)
    check_turn({"role": "user", "loss": False, "tool_calls": []}, 1)  # of a question it says nothing


def test_annotation_files() -> None:
    assert FORM_READERS["coco_caption"]({"caption": ["C", "D"]}) == [("user", (PLACE,)), ("assistant", ("C",))]
    votes = {"question": "Q", "answer": ["no", "yes", "yes", "no"]}
    assert read_turns(votes, "coco_vqa") == [("user", (PLACE, "\nQ")), ("assistant", ("no",))]


def test_a_question_may_lack_its_answer() -> None:
    assert read_open_turns({"query": "Q"}) == [("user", ("Q",))]
    assert read_open_turns({"text": "Q", "image": "a.png"}) == [("user", (PLACE, "\nQ"))]
    assert is_bare_question({"text": "Q"}) and not is_bare_question({"query": "Q"})


def test_addresses() -> None:
    assert image_addresses({"image": {"path": "a.png", "bytes": None}, "images": ["a.png"]}) == ["a.png"]
    with pytest.raises(UserError, match="name different images"):
        image_addresses({"image": "a.png", "images": ["b.png"]})
    assert folders_of(["x/a.png", "b.png", "http://host/c.png", "data:,"]) == {"x", ""}
    assert [locate(path, "r") for path in ("a.png", "/a.png", "data:,")] == ["r/a.png", "/a.png", "data:,"]


def test_a_sample_comes_back_from_llavas_form() -> None:
    record = {
        "messages": [
            {"role": "user", "content": "<image>What is at <bbox>?"},
            {"role": "assistant", "content": "Here."},
        ],
        "images": ["a.png"],
        "objects": {"bbox": [[0.1, 0.2, 0.3, 0.4]], "bbox_type": "norm1"},
    }
    sample = parse_record(record, "r")
    assert parse_record(llava_record(sample, "0"), "r") == sample
    with pytest.raises(UserError, match="holds <image> as words, which LLaVA's form reads as a place"):
        parts = [{"type": "text", "text": "<image>"}]
        words = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "A"}]}
        llava_record(parse_record(words, "r"), "0")
