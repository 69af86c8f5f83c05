"""Many questions at once: the answers are those of each alone, in the questions' order; a bad one stops none."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.checkpoints.load import load_pretrained
from paddlemix.checkpoints.pretrained import Pretrained
from paddlemix.datasets.forms.parse import parse_question
from paddlemix.errors import MissingFileError, UserError
from paddlemix.generation.chat import ChatSession
from paddlemix.generation.predict import batches_by_length, predict
from paddlemix.generation.sampling import GenerationSettings
from paddlemix.processors.text.known_templates import get_template
from tests.conftest import ROOT
from tests.tiny_world import World

SHORT = GenerationSettings(max_new_tokens=6)


@pytest.fixture(scope="module")
def loaded(world: World) -> Pretrained:
    return load_pretrained(world.model)


@pytest.fixture(scope="module")
def records(world: World) -> list[dict[str, Any]]:
    """Of different lengths, with no, one and two images, and with history."""
    images = [f"images/{number}.png" for number in range(6)]
    return [
        {"image": images[0], "text": "What is the colour of the big bus?"},
        {"text": "How many?"},
        {"image": images[1], "text": "这是什么颜色?"},
        {"image": images[2:4], "text": "Where is the small cat?"},
        {"image": images[4], "conversations": [["<image>How many?", "1, 2"], ["What is the colour?", "It is red."]]},
        {"image": images[5], "text": "Where is the small cat? " * 8},
        {"text": "这是什么颜色?"},
        {"image": images[0], "text": "How many?"},
    ]


def test_batched_equals_single_and_chat(world: World, loaded: Pretrained, records: list[dict[str, Any]]) -> None:
    single = predict(loaded, records, SHORT, batch_size=1, image_root=str(world.data))
    assert len({answer.text for answer in single}) > 3 and all(answer.error is None for answer in single)
    for batch_size in (3, 8):
        assert predict(loaded, records, SHORT, batch_size=batch_size, image_root=str(world.data)) == single
    assert [answer.reference for answer in single] == [*[None] * 4, "It is red.", *[None] * 3]
    assert single[4].prompt == "What is the colour?"
    chat = ChatSession(loaded, settings=SHORT)
    assert "".join(chat.ask("How many?")).strip() == single[1].text


def test_draws_do_not_depend_on_what_was_answered_before(
    world: World, loaded: Pretrained, records: list[dict[str, Any]]
) -> None:
    def drawn(seed: int) -> list[str]:
        settings = GenerationSettings(max_new_tokens=6, temperature=1.5, seed=seed)
        return [answer.text for answer in predict(loaded, records, settings, batch_size=3, image_root=str(world.data))]

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_bad_question_is_an_answer(world: World, loaded: Pretrained) -> None:
    asked = [
        {"text": "How many?"},
        {"image": "none.png", "text": "What?"},
        {"text": "What? " * 400},
        {"image": "train.json", "text": "What?"},
        {"conversation": []},
        {"text": "<image>What?"},
        {"text": "How many?"},
    ]
    answers = predict(loaded, asked, SHORT, batch_size=4, image_root=str(world.data))
    assert answers[0] == answers[6] and answers[0].error is None and answers[0].text
    expected = (
        (1, "questions record 1: image '.*none.png' does not exist"),
        (2, "the conversation has .* tokens, .* more than the model's context of 512"),
        (3, "is not an image file"),
        (4, "neither a question"),
        (5, "1 <image> in the questions but 0 in 'image'"),
    )
    for index, message in expected:
        assert answers[index].text == ""
        with pytest.raises(UserError, match=message):
            raise UserError(answers[index].error)
    assert answers[1].prompt == "What?"


def test_no_tower(world: World) -> None:
    asked = [{"image": "images/0.png", "text": "What?"}, {"text": "How many?"}]
    seen, blind = predict(world.llama, asked, SHORT, image_root=str(world.data))
    assert "no vision tower" in str(seen.error)
    assert blind.error is None


def test_samples_templates_and_no_question(loaded: Pretrained) -> None:
    sample = parse_question({"text": "How many?"}, "mine")
    (answer,) = predict(loaded, [sample], SHORT)
    assert predict(loaded, [{"text": "How many?"}], SHORT) == [answer]
    assert predict(loaded, [sample], SHORT, template=get_template("llava_llama_3")) != [answer]
    assert predict(loaded, [], SHORT) == []


def test_what_cannot_be_used(world: World, loaded: Pretrained) -> None:
    with pytest.raises(UserError, match="batch_size 0 must be at least 1"):
        predict(loaded, [{"text": "What?"}], SHORT, batch_size=0)
    with pytest.raises(MissingFileError):
        predict(world.root / "none", [], SHORT)


def test_the_longest_come_first_and_equal_ones_in_order() -> None:
    assert batches_by_length(np.array([3, 9, 0, 9, 5]), 2) == [[1, 3], [4, 0], [2]]


def test_the_example_of_the_page_runs(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "predict.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "example.py").write_text(example, encoding="utf-8")
    (tmp_path / "model").symlink_to(world.model)
    (tmp_path / "images").symlink_to(world.data / "images")
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path("example.py")
    first, second, lost = names["answers"]
    assert first.text and second.text and "lost.png' does not exist" in lost.error
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].endswith(f"-> {first.text}") and shown[2].endswith(lost.error)
    assert shown[3].strip() == first.text  # the chat gives the same answer
    assert names["second"]


def test_a_stop_text_ends_answers(world: World, loaded: Pretrained, records: list[dict[str, Any]]) -> None:
    plain = predict(loaded, records, SHORT, image_root=str(world.data))
    text = max((answer.text for answer in plain), key=len)
    stop = text[len(text) // 2 :]
    settings = GenerationSettings(max_new_tokens=6, stop=(stop,))
    stopped = predict(loaded, records, settings, batch_size=3, image_root=str(world.data))
    assert [answer.text for answer in stopped] == [answer.text.split(stop)[0].strip() for answer in plain]
    assert stopped != plain


def test_beams_are_those_of_one_question_alone(world: World, loaded: Pretrained, records: list[dict[str, Any]]) -> None:
    settings = GenerationSettings(max_new_tokens=4, num_beams=3)
    alone = predict(loaded, records[:3], settings, batch_size=1, image_root=str(world.data))
    assert predict(loaded, records[:3], settings, batch_size=3, image_root=str(world.data)) == alone
