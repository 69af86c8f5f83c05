"""Records that are asked: LLaVA's question files and training records, what is history and what is the reference."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.datasets.forms.parse import parse_question
from paddlemix.datasets.records.record_file import open_records
from paddlemix.errors import UserError
from paddlemix.generation.questions import QuestionList, QuestionSettings, QuestionShare
from paddlemix.processors.text.tokenizer import Tokenizer
from paddlemix.sample import Sample
from tests.tiny import draw_picture, make_processor

Q = "What?"
SINGLE = ("user", (0, "\nWhat?"))


def turns(record: dict[str, Any], form: str | None = None) -> list[tuple[str, tuple[Any, ...]]]:
    sample = parse_question(record, "q.jsonl record 3", form=form)
    return [(message.role, message.content) for message in sample.messages]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"question_id": 1, "image": "a.png", "text": Q, "category": "x"}, [SINGLE]),
        ({"image": "a.png", "text": f"<image>\n{Q}"}, [SINGLE]),
        ({"image": ["a.png", "b.png"], "text": Q}, [("user", (0, "\n", 1, "\nWhat?"))]),
        ({"image": ["a.png", "b.png"], "text": "<image> or <image>?"}, [("user", (0, " or ", 1, "?"))]),
        ({"text": Q}, [("user", (Q,))]),
        ({"text": Q, "system": "Be brief."}, [("system", ("Be brief.",)), ("user", (Q,))]),
        ({"conversations": [[Q, "It."]]}, [("user", (Q,)), ("assistant", ("It.",))]),
        ({"conversations": [[Q, " "]]}, [("user", (Q,))]),
        ({"conversations": [{"from": "human", "value": Q}]}, [("user", (Q,))]),
        (
            {"messages": [{"role": role, "content": Q} for role in ("user", "assistant", "user")]},
            [("user", (Q,)), ("assistant", (Q,)), ("user", (Q,))],
        ),
        ({"query": Q, "images": ["a.png"]}, [("user", (0, Q))]),
        ({"query": Q, "response": "It."}, [("user", (Q,)), ("assistant", ("It.",))]),
    ],
)
def test_what_is_asked(record: dict[str, Any], expected: list[Any]) -> None:
    assert turns(record) == expected


def test_annotation_files_may_lack_their_answers() -> None:
    assert turns({"image": "a.png", "question": Q}, "coco_vqa") == [SINGLE]
    assert turns({"image": "a.png"}, "coco_caption") == [("user", (0,))]
    assert len(turns({"image": "a.png", "question": Q, "answer": ["no", "no"]}, "coco_vqa")) == 2


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"question": Q},
            "neither a question .'text'. nor one of 'conversations', 'messages', 'query' .keys: question",
        ),
        ({"text": 3}, "text is a JSON number, expected the question"),
        ({"text": f"<image>{Q}"}, "1 <image> in the questions but 0 in 'image'; each image needs one"),
        ({"text": f"<image>{Q}", "image": ["a", "b"]}, "1 <image> in the questions but 2 in 'image'"),
        ({"text": "\ud800"}, "half a character"),
        ({"messages": [{"role": "system", "content": Q}]}, "0 turns: the last question has no answer"),
        ({"conversations": [["q", ""], ["q", "a"]]}, "turn 2: the answer is empty"),
    ],
)
def test_what_cannot_be_asked(record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"q.jsonl record 3: .*{message}"):
        parse_question(record, "q.jsonl record 3")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw_picture(40, 30, 1).save(tmp_path / "a.png")
    records: list[Any] = [
        {"question_id": "x7", "image": "a.png", "text": "What is the colour of the big bus?"},
        {"id": 5, "conversations": [["How many?", "2"], ["Where is the cat?", " On the mat. "]]},
        {"question_id": 9, "image": "none.png", "text": Q},
        {"image": "a.png", "conversations": [["<image>Where is <ref-object>?", "<bbox>"]]},
    ]
    records[3]["objects"] = {"ref": ["the cat"], "bbox": [[10, 6, 20, 15]]}
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"text": \n')
    return tmp_path


@pytest.fixture
def questions(folder: Path, tokenizer: Tokenizer) -> QuestionList:
    records = open_records(folder / "q.jsonl")
    return QuestionList(records, make_processor(tokenizer), QuestionSettings(name="q", image_root=str(folder)))


def test_encoded_questions(questions: QuestionList) -> None:
    first, second, fourth = (questions.encode(index) for index in (0, 1, 3))
    assert (first.text, first.reference, first.prompt.num_tiles) == ("What is the colour of the big bus?", None, 1)
    assert (second.text, second.reference, second.prompt.num_tiles) == ("Where is the cat?", "On the mat.", 0)
    assert fourth.reference == "[0.25, 0.28, 0.5, 0.5]"  # of the padded square, as the model learned it
    assert [questions.names(index) for index in range(5)] == [
        ("x7", first.text),
        *((5, ""), (9, Q), (3, ""), (4, "")),
    ]


def test_errors_name_record_and_image(questions: QuestionList) -> None:
    with pytest.raises(UserError, match="q record 2: image '.*none.png' does not exist"):
        questions.encode(2)
    with pytest.raises(UserError, match=r"q\.jsonl"):
        questions.encode(4)


def test_lengths_are_those_of_the_prompts(questions: QuestionList) -> None:
    for index in (0, 1, 3):
        ids = questions.encode(index).prompt.input_ids
        assert questions.measure(index) == (len(ids), int((ids < 0).sum()))
    assert questions.measure(2) == questions.measure(4) == (0, 0)
    share = pickle.loads(pickle.dumps(QuestionShare(questions, range(1, 4))))
    assert len(share) == 3 and share.measure(0) == questions.measure(1)
    assert share.fingerprint != QuestionShare(questions, range(3)).fingerprint


def test_a_url_that_is_not_there_yet_is_not_fetched_to_measure(tokenizer: Tokenizer) -> None:
    asked = QuestionList(
        [{"image": "http://127.0.0.1:9/a.png", "text": Q}], make_processor(tokenizer), QuestionSettings()
    )
    assert asked.measure(0)[1] == 4


def test_samples_and_what_is_neither(tokenizer: Tokenizer) -> None:
    sample = parse_question({"text": Q}, "mine")
    asked = QuestionList([sample, 3], make_processor(tokenizer), QuestionSettings())  # type: ignore[list-item]
    assert isinstance(asked.sample(0), Sample) and asked.encode(0).text == Q
    assert np.array_equal(asked.measure(1), (0, 0))
    with pytest.raises(UserError, match=r"questions record 1: it is a int, expected a record \(a dict\) or a Sample"):
        asked.encode(1)


LINE = "Answer with the option's letter from the given choices directly."


def words(tokenizer: Tokenizer, folder: Path, record: Any, suffix: str = "") -> str:
    settings = QuestionSettings(image_root=str(folder), suffix=suffix)
    asked = QuestionList([record], make_processor(tokenizer), settings)
    assert asked.words(0) == asked.encode(0).text
    return asked.encode(0).text


@pytest.mark.parametrize("suffix", ["", LINE])
@pytest.mark.parametrize(
    ("record", "expected"),
    [
        # Source: what LLaVA's model_vqa_science.py writes as "prompt"
        (
            {"image": "a.png", "conversations": [{"from": "human", "value": "Which?\nA. b\n<image>"}]},
            "<image>\nWhich?\nA. b",
        ),
        ({"conversations": [{"from": "human", "value": "Which?\nA. b"}]}, "Which?\nA. b"),
        # and model_vqa.py, model_vqa_loader.py: the line of the question file
        ({"image": "a.png", "text": "Q?\nReference OCR token: \nShort."}, "Q?\nReference OCR token: \nShort."),
        ({"image": "a.png", "text": "<image>\nQ?"}, "<image>\nQ?"),
        ({"image": "a.png", "conversations": [["<image>First?", "1"], ["Second?", "2"]]}, "Second?"),
        ({"image": ["a.png", "a.png"], "conversations": [["<image> or <image>?", ""]]}, "<image>\n<image>\nor ?"),
    ],
)
def test_words_are_those_of_llava_s_answer_files(
    folder: Path, tokenizer: Tokenizer, record: dict[str, Any], expected: str, suffix: str
) -> None:
    assert words(tokenizer, folder, record, suffix) == (f"{expected}\n{suffix}" if suffix else expected)


@pytest.mark.parametrize("image", [{}, {"image": "a.png"}])
def test_an_added_line_is_asked_as_if_it_were_written(
    folder: Path, tokenizer: Tokenizer, image: dict[str, Any]
) -> None:
    def ids(text: str, suffix: str = "") -> list[int]:
        settings = QuestionSettings(image_root=str(folder), suffix=suffix)
        asked = QuestionList([{**image, "text": text}], make_processor(tokenizer), settings)
        assert asked.measure(0)[0] == len(asked.encode(0).prompt.input_ids)
        return list(asked.encode(0).prompt.input_ids)

    assert ids("How many? ", LINE) == ids(f"How many?\n{LINE}") != ids("How many?")
    sample = parse_question({**image, "text": "How many?"}, "mine", folder)
    asked = QuestionList([sample], make_processor(tokenizer), QuestionSettings(suffix=LINE))
    assert list(asked.encode(0).prompt.input_ids) == ids("How many?", LINE)


def test_an_added_line_makes_other_lengths(folder: Path, tokenizer: Tokenizer) -> None:
    records = open_records(folder / "q.jsonl")
    lists = [QuestionList(records, make_processor(tokenizer), QuestionSettings(suffix=suffix)) for suffix in ("", LINE)]
    assert lists[0].fingerprint != lists[1].fingerprint
