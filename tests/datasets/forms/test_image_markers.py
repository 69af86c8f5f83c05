"""What other programs write for a picture in a text is a picture where it says which one, else a doubt."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paddlemix.datasets.forms.image_markers import unread_picture
from paddlemix.datasets.forms.parse import parse_question, parse_record
from paddlemix.datasets.records.record_file import open_records
from paddlemix.errors import UserError
from paddlemix.sample import Sample
from tests.conftest import HANG, ROOT

TAKEN = "in a question is read as words, no picture is shown there; where one is meant, write <image> and name"
TOKENS = ["<|image|>", "<|vision_start|><|image_pad|><|vision_end|>", "<|image_1|>", "<image_1>", "<ImageHere>"]
TOKENS += ["<image_placeholder>", "<img><IMG_CONTEXT><IMG_CONTEXT></img>", "<Image>"]


def conversation(question: str, **keys: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "A"}], **keys}


FORMS = {
    "from/value": conversation,
    "pairs": lambda question, **keys: {"conversations": [[question, "A"]], **keys},
    "messages": lambda question, **keys: {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "A"}],
        **keys,
    },
    "query": lambda question, **keys: {"query": question, "response": "A", **keys},
}


def content(sample: Sample) -> tuple[tuple[str | int, ...], tuple[str, ...]]:
    return sample.messages[0].content, sample.images  # type: ignore[return-value]


@pytest.mark.parametrize("form", FORMS)
def test_an_address_in_a_tag_is_a_picture(form: str) -> None:
    record = FORMS[form]("Picture 1: <img>a.png</img>\nAnd <img> https://h/b c.jpg </img>?")
    found = parse_record(record, "r", "root")
    assert content(found) == (("Picture 1: ", 0, "\nAnd ", 1, "?"), ("root/a.png", "https://h/b c.jpg"))
    assert unread_picture(found.messages) is None


def test_a_tag_beside_places_keeps_the_order() -> None:
    found = parse_record(conversation("<image><img>b.png</img><image>?", image=["a.png", "c.png"]), "r")
    assert content(found) == ((0, 1, 2, "?"), ("a.png", "b.png", "c.png"))


def test_a_tag_in_a_question_file() -> None:
    found = parse_question({"question_id": 1, "text": "<img>a.png</img>What?"}, "r")
    assert content(found) == ((0, "What?"), ("a.png",))


def test_a_tag_of_an_answer_is_text() -> None:
    record = {"conversations": [["Q", "<img>a.png</img>"]]}
    assert parse_record(record, "r").images == ()


def test_a_tag_with_no_path_is_refused() -> None:
    with pytest.raises(UserError, match="a path has no NUL character"):
        parse_record(conversation("<img>a\0b</img>"), "r")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("token", TOKENS)
def test_tokens_of_listed_pictures_are_their_places(form: str, token: str) -> None:
    found = parse_record(FORMS[form](f"One {token} and {token}?", images=["a.png", "b.png"]), "r")
    assert content(found) == (("One ", 0, " and ", 1, "?"), ("a.png", "b.png"))
    assert unread_picture(found.messages) is None


@pytest.mark.parametrize(
    "token", [*TOKENS, "![a cup](a.png)", '![](https://h/a.JPG "title")', '<img width=3 src="a.png">']
)
def test_what_is_not_read_is_a_doubt(token: str) -> None:
    found = unread_picture(parse_record(conversation(f"What is {token}?"), "r").messages)
    assert found is not None and found.startswith(f"'{token}' {TAKEN}")


def test_more_tokens_than_pictures_are_no_places() -> None:
    with pytest.raises(UserError, match="0 <image> in the questions but 1 in 'image'"):
        parse_record(conversation("<|image|><|image|>", image="a.png"), "r")
    found = parse_record(FORMS["query"]("<|image|><|image|>", images=["a.png"]), "r")
    assert content(found) == ((0, "<|image|><|image|>"), ("a.png",))
    assert unread_picture(found.messages) is not None


def test_a_place_in_a_part_is_a_doubt() -> None:
    """Parts have pictures of their own, so that `<image>` in a part's text is text."""
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "<image>What?"}]
    record = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "A"}]}
    assert (unread_picture(parse_record(record, "r").messages) or "").startswith(f"'<image>' {TAKEN}")


@pytest.mark.parametrize(
    "text", ["a < b > c", "[link](a.png)", "![x](a.html)", "<img>", "write ![alt](url)", "img src=a"]
)
def test_ordinary_text_is_no_doubt(text: str) -> None:
    assert unread_picture(parse_record(conversation(text), "r").messages) is None


@pytest.mark.parametrize("inside", ["", "  ", "a.png\nb.png", "a" * 4097])
def test_a_tag_without_an_address_is_a_doubt(inside: str) -> None:
    found = parse_record(conversation(f"<img>{inside}</img>Q"), "r")
    assert found.images == () and content(found)[0] == (f"<img>{inside}</img>Q",)
    assert (unread_picture(found.messages) or "").startswith("'<img>")


_ENDLESS = """
from paddlemix.datasets.images.limits import _SVG
from paddlemix.datasets.forms.image_markers import split_text, unread_picture
from paddlemix.sample import Message

texts = ["<img>" + " " * 100_000, "![" * 100_000, "<img " + "src=" * 100_000, "<img>" * 100_000]
for text in texts:
    assert split_text(text) == (text,)
    unread_picture([Message(role="user", content=(text,))])
assert _SVG.match(b"<!---->" * 500) is None
assert _SVG.match(b"<!---->" * 500 + b"<svg>") is not None
"""


def test_no_text_and_no_beginning_of_a_file_is_searched_for_ever() -> None:
    """What makes a search try the same characters again and again: each would take hours."""
    subprocess.run([sys.executable, "-c", _ENDLESS], cwd=ROOT, check=True, timeout=HANG)


def test_a_run_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from paddlemix.datasets.mixture import SampleDataset

    monkeypatch.setenv("PADDLEMIX_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "train.json"
    path.write_text(json.dumps([conversation(text) for text in ("Q", "<|image|>Q", "![](a.png)")]))
    for _ in range(2):  # the second time from the kept index
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            SampleDataset([{"data_files": str(path)}], lambda template: None)  # type: ignore[arg-type,return-value]
        (message,) = [record.getMessage() for record in caplog.records]
        assert message.startswith("2 of 3 records are doubtful, `paddlemix check-data` lists them; the first: ")
        assert f"{path} record 1: '<|image|>' {TAKEN}" in message
    assert [number for number, _ in open_records(path).doubts()] == [1, 2]
    assert open_records(path).problems() == []
