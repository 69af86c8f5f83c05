"""Examples as people read them: exactly the trained text is marked, images are named, terminals are left alone."""

from __future__ import annotations

import io
import re

import pytest

from paddlemix.processors.text.example_text import Style, escape_control, image_runs, marked_text, one_token_an_image
from paddlemix.processors.text.tokenizer import Tokenizer
from paddlemix.sample import IMAGE_TOKEN_INDEX, Example
from tests.tiny import make_processor, make_sample


def example(tokenizer: Tokenizer, *turns: str) -> Example:
    sample = make_sample(*turns)
    return make_processor(tokenizer).encode_text(sample.messages, [(40, 30)] * len(sample.images))


def test_the_marks_hold_the_answers_and_their_ends(tokenizer: Tokenizer) -> None:
    found = example(tokenizer, "<image>\nWhat?", "It is red.\nBig.", "How many?", "1, 2")
    text = marked_text(found, image_runs(found), tokenizer, Style.plain())
    assert re.findall(r"\[\[(.*?)\]\]", text) == [" It is red.", "Big.</s>", " 1, 2</s>"]
    assert (
        text.replace("[[", "")
        .replace("]]", "")
        .endswith("USER: <image x 4>\nWhat? ASSISTANT: It is red.\nBig.</s> USER: How many? ASSISTANT: 1, 2</s>")
    )


def test_every_line_ends_its_colour(tokenizer: Tokenizer) -> None:
    found = example(tokenizer, "<image>\nWhat?", "It is red.\n\nBig.")
    text = marked_text(found, image_runs(found), tokenizer, Style.coloured())
    assert text.count("\x1b[32m") == 2 and text.count("\x1b[34m") == 1
    assert all(line.count("\x1b[0m") == len(re.findall(r"\x1b\[3\dm", line)) for line in text.split("\n"))


def test_touching_images_are_told_apart_where_their_tokens_are_known(tokenizer: Tokenizer) -> None:
    found = example(tokenizer, "<image><image>What?", "It is red.")
    assert sum(image_runs(found)) == 8
    ids, labels = one_token_an_image(found, [4, 4])
    assert ids.count(IMAGE_TOKEN_INDEX) == 2 and len(ids) == len(labels) == len(found.input_ids) - 6
    assert marked_text(found, [4, 4], tokenizer, Style.plain()).count("<image x 4>") == 2


def test_without_an_image_there_is_no_run(tokenizer: Tokenizer) -> None:
    assert image_runs(example(tokenizer, "What?", "It is red.")) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert Style.of_stream(Terminal()) == Style.coloured()
    assert Style.of_stream(io.StringIO()) == Style.of_stream(None) == Style.plain()
    monkeypatch.setenv("NO_COLOR", "1")
    assert Style.of_stream(Terminal()) == Style.plain()


def test_nothing_that_a_terminal_obeys_is_left() -> None:
    assert escape_control("a\x1b[31m\x07\nb\tc") == "a\\x1b[31m\\x07\nb\tc"
