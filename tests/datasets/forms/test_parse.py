"""Records -> Samples: every form of conversation, places of images, and errors that name what they found."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddlemix.datasets.forms.parse import FORMS, parse_record
from paddlemix.errors import UserError
from paddlemix.sample import Message, Sample


def pairs(*conversations: list[str], **keys: Any) -> dict[str, Any]:
    return {"conversations": list(conversations), **keys}


def turns(*values: tuple[str, str], **keys: Any) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in values], **keys}


def messages(*values: tuple[str, Any], **keys: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in values], **keys}


def text_part(text: Any) -> dict[str, Any]:
    return {"type": "text", "text": text}


def parse(record: dict[str, Any], image_root: str | None = None, form: str | None = None) -> Sample:
    return parse_record(record, "train.json record 17", image_root, form)


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
        (
            {"conversation": [["Q", "A"]]},
            "its form is not known (keys: conversation); a record has one of 'conversations'",
        ),
        ({"mesages": []}, "; did you mean 'messages'?"),
        ({"id": 3, "text": "x"}, "its form is not known (keys: id, text)"),
        ({}, "its form is not known (keys: none)"),
        (pairs(["Q", "A"], messages=[]), "'conversations' and 'messages' are each a conversation"),
        (messages(("user", "Q"), query="Q", response="A"), "'messages' and 'query' are each a conversation"),
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
        (pairs(["<image>", "A"], image="a.png", images=["b.png"]), "'image' and 'images' name different images"),
        (pairs(["<image>", "A"], image={"bytes": "aGk="}), "image has its image as 'bytes', which JSON cannot hold"),
        (pairs(["<image>", "A"], images=["a.png", None]), "images is null, expected a path or URL"),
        (pairs(["<image>", "A"], image="a\0.png"), "a path has no NUL character"),
        (pairs(["<image>", "A"], image="a\ud83d.png"), "half a character"),
        (pairs(["Q", "A"], rejected_response="B"), "'rejected_response' is not supported: preference data"),
        (pairs(["Q", "A"], videos=["a.mp4"]), "'videos' is not supported: only images are"),
        (pairs(["Q", "A"], tools="[{}]"), "'tools' is not supported: tool calls"),
        (pairs(["Q", "A"], system=3), "system is a JSON number, expected text"),
        (turns(("system", "S"), ("human", "Q"), ("gpt", "A"), system="T"), "both contain a system text; keep one"),
        (turns(("human", "Q"), ("observation", "A")), "turn 2: from='observation' is not supported: tool calls"),
        ({"messages": "Q"}, "'messages' is not a list of {'role', 'content'} turns or is empty"),
        ({"messages": []}, "'messages' is not a list"),
        ({"messages": [["Q", "A"]]}, "'messages' is not a list"),
        ({"messages": [{"role": "user"}]}, "turn 1 has the keys role, expected 'role' and 'content'"),
        (messages(("user", "Q"), ("tool", "A")), "turn 2: role='tool' is not supported: tool calls"),
        (messages(("user", None)), "turn 1: content is a JSON null, expected text or a list of parts"),
        (messages(("user", ["Q"])), "turn 1: content is a JSON array, expected text or a list of parts"),
        (messages(("user", [{"text": "Q"}])), "turn 1: a part of type null is not one of text, image_url, image"),
        (messages(("user", [{"type": "input_audio"}])), 'turn 1: a part of type "input_audio" is not one of'),
        (messages(("user", [text_part(3)])), "turn 1: the text of a part is a JSON number, expected text"),
        (messages(("user", [{"type": "image_url"}])), "turn 1: image_url is null, expected a path or URL"),
        (messages(("user", [{"type": "image_url", "image_url": {}}])), "turn 1: image_url is {}, expected"),
        (
            messages(("user", "Q"), ("assistant", [{"type": "image", "image": "a.png"}])),
            "turn 2: a turn of the assistant has an image",
        ),
        (messages(("user", [{"type": "image"}]), ("assistant", "A")), "1 <image> in the questions but 0 in 'image'"),
        (messages(("user", "<image>"), ("assistant", "A"), images=["a", "b"]), "1 <image> in the questions but 2"),
        (
            {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "tool_calls": [{}]}]},
            "turn 2: 'tool_calls' is not supported: tool calls",
        ),
        (
            {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "loss": False}]},
            "turn 2: 'loss' false is not supported: every answer is trained",
        ),
        (
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A", "weight": 0}]},
            "turn 2: 'weight' 0 is not supported: every answer is trained",
        ),
        ({"query": "Q"}, "response is a JSON null, expected text"),
        ({"query": ["Q"], "response": "A"}, "query is a JSON array, expected text"),
        ({"query": "Q", "response": "A", "history": "H"}, "history is a JSON text, expected a list of"),
        ({"query": "Q", "response": "A", "history": [["Q"]]}, 'history pair 1 is ["Q"], expected'),
    ],
)
def test_record_that_cannot_be_used(record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match="^train.json record 17: .*" + re.escape(message)):
        parse(record)


QUESTION, ANSWER = Message(role="user", content=(0, "What is it?")), Message(role="assistant", content=("A cat.",))
MORE = (Message(role="user", content=("Sure?",)), Message(role="assistant", content=("Yes",)))
PART = {"type": "image_url", "image_url": {"url": "a.jpg", "detail": "low"}}
ONE = [
    pairs(["<image>What is it?", "A cat."], image="a.jpg"),
    pairs(["<image>What is it?", "A cat."], images=["a.jpg"], image=["a.jpg"], messages=None, query=None),
    pairs(["<image>What is it?", "A cat."], images=[{"path": "a.jpg", "bytes": None}]),
    pairs(["<image>What is it?", "A cat."], image={"url": "a.jpg"}),
    turns(("human", "<image>What is it?"), ("gpt", "A cat."), images=["a.jpg"], tools=[], videos=None, id=[1]),
    {"conversations": messages(("user", "<image>What is it?"), ("assistant", "A cat."))["messages"], "image": "a.jpg"},
    messages(("user", [PART, text_part("What is it?")]), ("assistant", [text_part("A cat.")])),
    messages(("user", [{**PART, "image_url": "a.jpg"}, text_part("What is it?")]), ("assistant", "A cat.")),
    messages(("user", [{"type": "image", "image": "a.jpg"}, text_part("What is it?")]), ("assistant", "A cat.")),
    messages(("user", [{"type": "image"}, text_part("What is it?")]), ("assistant", "A cat."), images=["a.jpg"]),
    messages(("user", "<image>What is it?"), ("assistant", "A cat."), images=["a.jpg"]),
    messages(("user", "What is it?"), ("assistant", "A cat."), images=["a.jpg"]),
    {"query": "What is it?", "response": "A cat.", "images": ["a.jpg"]},
    {"query": "<image>What is it?", "response": "A cat.", "images": ["a.jpg"], "history": None},
]


@pytest.mark.parametrize("record", ONE)
def test_every_form_gives_the_same_sample(record: dict[str, Any]) -> None:
    sample = parse(record)
    assert (sample.messages, sample.images) == ((QUESTION, ANSWER), ("a.jpg",))


def test_history_comes_first_and_takes_the_images() -> None:
    sample = parse({"query": "Sure?", "response": "Yes", "history": [["What is it?", "A cat."]], "images": ["a.jpg"]})
    assert sample.messages == (QUESTION, ANSWER, *MORE)


def test_images_of_later_turns_and_of_both_sources() -> None:
    user = [{"type": "image"}, text_part("like"), {"type": "image_url", "image_url": "data:image/png;base64,AA=="}]
    record = messages(("user", user), ("assistant", "No"), ("user", [{"type": "image"}]), ("assistant", "Yes"))
    sample = parse({**record, "images": ["a.jpg", "https://x.org/b.jpg"]}, "/root")
    assert sample.messages[0].content == (0, "like", 1) and sample.messages[2].content == (2,)
    assert sample.images == (os.path.join("/root", "a.jpg"), "data:image/png;base64,AA==", "https://x.org/b.jpg")


def test_placeholder_in_a_text_part_is_text() -> None:
    assert parse(messages(("user", [text_part("Write <image>.")]), ("assistant", "A"))).messages[0].content == (
        "Write <image>.",
    )


def test_system_key() -> None:
    sample = parse({"query": "Q", "response": "A", "system": "Be brief."})
    assert [message.role for message in sample.messages] == ["system", "user", "assistant"]
    assert sample.messages[0].text == "Be brief."


@pytest.mark.parametrize(
    ("form", "record", "question", "answer"),
    [
        ("coco_caption", {"caption": "A red bus.", "image_id": "coco_1"}, (0,), "A red bus."),
        ("vg_caption", {"caption": ["A bus.", "A red bus."]}, (0,), "A bus."),
        ("coco_vqa", {"question": "Colour?", "answer": ["blue", "red", "red"]}, (0, "\nColour?"), "red"),
        ("coco_vqa", {"question": "Colour?", "answer": ["blue", "red"]}, (0, "\nColour?"), "blue"),
        ("coco_vqa", {"question": "Colour?", "answer": "red"}, (0, "\nColour?"), "red"),
    ],
)
def test_forms_of_paddlemix(form: str, record: dict[str, Any], question: tuple[Any, ...], answer: str) -> None:
    sample = parse({"image": "a.jpg", **record}, "images", form)
    assert form in FORMS
    assert [message.content for message in sample.messages] == [question, (answer,)]
    assert sample.images == (os.path.join("images", "a.jpg"),)


@pytest.mark.parametrize("form", ["chatml_dataset", "my_own", None])
def test_other_names_leave_the_form_to_the_record(form: str | None) -> None:
    assert parse(ONE[0], form=form) == parse(ONE[0])


@pytest.mark.parametrize(
    ("form", "record", "message"),
    [
        ("coco_caption", {"image": "a"}, "caption is a JSON null, expected text"),
        ("coco_caption", {"image": "a", "caption": []}, "caption is a JSON array, expected text"),
        ("vg_caption", {"image": "a", "caption": " "}, "turn 2: the answer is empty"),
        ("coco_caption", {"caption": "A bus."}, "1 <image> in the questions but 0 in 'image'"),
        ("coco_vqa", {"image": "a", "question": "Q"}, "answer is null, expected a text or a list of texts"),
        ("coco_vqa", {"image": "a", "question": "Q", "answer": []}, "answer is [], expected"),
        ("coco_vqa", {"image": "a", "answer": ["A"]}, "question is a JSON null, expected text"),
    ],
)
def test_record_that_its_form_does_not_fit(form: str, record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match="^train.json record 17: .*" + re.escape(message)):
        parse(record, form=form)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("<image>"),
    lambda items: st.lists(items, max_size=3) | st.dictionaries(st.text(max_size=5), items, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(["conversations", "messages", "query", "response", "history", "image", "images", "objects"])
TURN = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]) | JSON, "value": JSON, "role": JSON})


@given(record=st.dictionaries(KEYS | st.text(max_size=5), JSON | st.lists(TURN, max_size=3), max_size=4))
def test_any_json_is_a_sample_or_a_named_error(record: dict[str, Any]) -> None:
    try:
        sample = parse(record)
    except UserError as error:
        assert str(error).startswith("train.json record 17: ")
    else:
        assert sample.messages[-1].role == "assistant"
