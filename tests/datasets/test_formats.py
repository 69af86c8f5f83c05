"""Records -> Samples: both conversation forms, places of images, and errors that name what they found."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddlemix.datasets.formats import parse_record, read_records
from paddlemix.errors import MissingFileError, UserError
from paddlemix.sample import Message, Sample


def pairs(*conversations: list[str], **keys: Any) -> dict[str, Any]:
    return {"conversations": list(conversations), **keys}


def turns(*values: tuple[str, str], **keys: Any) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in values], **keys}


def parse(record: dict[str, Any], image_root: str | None = None) -> Sample:
    return parse_record(record, "train.json record 17", image_root)


def test_pairs() -> None:
    sample = parse(pairs(["<image>\nWhat is it?", "A cat."], ["Sure?", "Yes"], image="a.jpg", id="x"))
    assert sample == Sample(
        messages=(
            Message(role="user", content=(0, "\nWhat is it?")),
            Message(role="assistant", content=("A cat.",)),
            Message(role="user", content=("Sure?",)),
            Message(role="assistant", content=("Yes",)),
        ),
        images=("a.jpg",),
        source="train.json record 17",
    )


@pytest.mark.parametrize(("human", "gpt"), [("human", "gpt"), ("user", "assistant")])
def test_turns_equal_pairs(human: str, gpt: str) -> None:
    record = turns((human, "<image>\nWhat is it?"), (gpt, "A cat."), image="a.jpg")
    assert parse(record) == parse(pairs(["<image>\nWhat is it?", "A cat."], image="a.jpg"))


def test_system_turn() -> None:
    sample = parse(turns(("system", "Be brief, no <image>."), ("human", "Q"), ("gpt", "A")))
    assert sample.messages[0] == Message(role="system", content=("Be brief, no <image>.",))


def test_images_are_counted_in_reading_order() -> None:
    sample = parse(pairs(["<image><image> a <image>", "A"], ["b <image>", "B"], image=["0", "1", "2", "3"]))
    assert sample.messages[0].content == (0, 1, " a ", 2)
    assert sample.messages[2].content == ("b ", 3)
    assert sample.messages[0].image_indices == (0, 1, 2)
    assert sample.messages[0].text == " a "


@pytest.mark.parametrize("image", [None, []])
def test_no_image(image: Any) -> None:
    assert parse(pairs(["Q", "A"], image=image)).images == parse(pairs(["Q", "A"])).images == ()


def test_placeholder_in_an_answer_is_text() -> None:
    assert parse(pairs(["Q", "Write <image> there."])).messages[1].content == ("Write <image> there.",)


@given(question=st.text(), answer=st.text().filter(str.strip))
def test_text_is_kept_as_it_is(question: str, answer: str) -> None:
    messages = parse(pairs([question.replace("<image>", ""), answer])).messages
    assert (messages[0].text, messages[1].text) == (question.replace("<image>", ""), answer)


def test_image_root(tmp_path: Path) -> None:
    absolute = str(tmp_path / "a.png")
    record = pairs(["<image><image><image>", "A"], image=["a/b.png", "https://x.org/c.png", absolute])
    assert parse(record).images == ("a/b.png", "https://x.org/c.png", absolute)
    assert parse(record, "/root").images == (os.path.join("/root", "a/b.png"), "https://x.org/c.png", absolute)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversation": [["Q", "A"]]}, r"no key 'conversations' (keys: conversation); did you mean 'conversation'?"),
        ({}, "no key 'conversations' (keys: none)"),
        ({"conversations": []}, "'conversations' is not a list of turns or is empty"),
        ({"conversations": "Q"}, "'conversations' is not a list of turns or is empty"),
        ({"conversations": [["Q", "A"], {"from": "human"}]}, "neither [question, answer] pairs nor {'from', 'value'}"),
        (pairs(["Q"]), 'pair 1 is ["Q"], expected [question, answer] texts'),
        (pairs(["Q", "A"], ["问", 3]), 'pair 2 is ["问", 3], expected'),  # type: ignore[list-item]
        (pairs([]), "pair 1 is [], expected"),
        ({"conversations": [{"from": "human", "text": "Q"}]}, "turn 1 has the keys from, text, expected 'from' and"),
        ({"conversations": [{}]}, "turn 1 has the keys none, expected"),
        (turns(("human", "Q"), ("bot", "A")), "turn 2: from='bot' is not one of human, user, gpt, assistant, system"),
        ({"conversations": [{"from": ["human"], "value": "Q"}]}, "turn 1: from='['human']' is not one of"),
        ({"conversations": [{"from": "human", "value": None}]}, "turn 1: value is a JSON null, expected text"),
        ({"conversations": [{"from": "human", "value": True}]}, "turn 1: value is a JSON boolean, expected text"),
        ({"conversations": [{"from": "human", "value": 1.5}]}, "turn 1: value is a JSON number, expected text"),
        (turns(("gpt", "A")), "turn 1 is by the assistant, expected the user"),
        (turns(("human", "Q"), ("human", "Q")), "turn 2 is by the user, expected the assistant"),
        (turns(("human", "Q"), ("system", "S")), "turn 2 is by the system, expected the assistant"),
        (turns(("human", "Q")), "1 turns: the last question has no answer"),
        (turns(("system", "S")), "0 turns: the last question has no answer"),
        (pairs(["Q", "A"], ["Q", " \n"]), "turn 4: the answer is empty"),
        (pairs(["Q", "a nice \ud83d"]), r"half a character, '\ud83d', follows the text 'a nice '"),
        (pairs(["Q", "A"], image=3), "image is 3, expected a path or URL, or a list of them"),
        (pairs(["Q", "A"], image=""), 'image is "", expected'),
        (pairs(["Q", "A"], image=["a.png", {}]), "image is {}, expected"),
        (pairs(["Q", "A"], image="a.png"), "0 <image> in the questions but 1 in 'image'"),
        (pairs(["<image>", "A"], ["<image>", "A"], image="a.png"), "2 <image> in the questions but 1 in 'image'"),
        (pairs(["<image>", "A"]), "1 <image> in the questions but 0 in 'image'; each image needs one <image>"),
    ],
)
def test_record_that_cannot_be_used(record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match="^train.json record 17: .*" + re.escape(message)):
        parse(record)


def test_read_records(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    records = [pairs(["问题", "A"]), pairs(["Q", "A"])]
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    assert read_records(path) == records
    path.write_text(json.dumps(records), encoding="utf-8-sig")  # with a byte order mark, as Windows editors write
    assert read_records(str(path)) == records


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[{]", "is not JSON: line 1, column 3"),
        (b'{"a": 1}\n{"a": 2}\n', "is not JSON: line 2, column 1: Extra data"),
        (b"", "is not JSON: line 1, column 1"),
        ('["é"]'.encode("latin-1"), "is not UTF-8 (byte 2); save it as UTF-8"),
        (b'{"conversations": []}', "holds a JSON object, expected an array of records"),
        (b'"text"', "holds a JSON text, expected an array"),
        (b"null", "holds a JSON null, expected an array"),
        (b"[]", "holds no record"),
        (b"[{}, [1]]", "train.json record 1: a JSON array, expected an object with 'conversations'"),
    ],
)
def test_file_that_cannot_be_used(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read_records(path)
    assert str(path) in str(caught.value)


def test_file_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingFileError, match=r"absent.json' does not exist \(looked in .*check dataset.data_files"):
        read_records(tmp_path / "absent.json")
    with pytest.raises(MissingFileError, match="is a folder; check dataset.data_files"):
        read_records(tmp_path)
    (tmp_path / "locked.json").write_text("[]")

    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(MissingFileError, match="locked.json' cannot be read: Permission denied"):
        read_records(tmp_path / "locked.json")
