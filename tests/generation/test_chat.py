"""Conversations: reuse changes nothing, an image is encoded once, history is the template's, no character is split."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from PIL import Image

from paddlemix.checkpoints.load import load_pretrained
from paddlemix.checkpoints.pretrained import Pretrained
from paddlemix.errors import UserError
from paddlemix.generation.chat import ChatSession
from paddlemix.generation.generate import generate
from paddlemix.generation.sampling import GenerationSettings, Sampler
from paddlemix.models.llava import LlavaModel
from paddlemix.processors.templates import get_template
from paddlemix.processors.tokenizer import Tokenizer
from paddlemix.sample import Message
from tests.tiny import ANYRES_SPEC, draw_picture, make_processor
from tests.tiny_models import tiny_llava, tiny_model, tiny_text, tiny_vision
from tests.tiny_world import World

SETTINGS = GenerationSettings(max_new_tokens=10)
QUESTIONS = ("What is this?", "And where is the cat?", "这是什么颜色?")


@pytest.fixture(scope="module")
def loaded(world: World) -> Pretrained:
    return load_pretrained(world.model)


@pytest.fixture
def images() -> list[Image.Image]:
    return [draw_picture(50, 40, 8), draw_picture(30, 60, 9)]


def ask(session: ChatSession, question: str, *images: Image.Image) -> str:
    return "".join(session.ask(question, images))


def answer_alone(loaded: Pretrained, messages: list[Message], images: list[Image.Image]) -> str:
    """The answer to a history, computed in one go by the batch path, without a cache from before."""
    assert loaded.processor is not None
    prompt = loaded.processor.encode_prompt(messages, images)
    tokenizer = loaded.processor.tokenizer
    return tokenizer.decode(generate(loaded.model, [prompt], SETTINGS, {tokenizer.eos_token_id})[0]).strip()


def script(monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> None:
    """The model then answers with these tokens."""
    rest: Iterator[int] = iter(tokens)
    monkeypatch.setattr(Sampler, "next_tokens", lambda self, scores: np.array([next(rest)]))


# ---- reuse ----


def test_every_round_with_reuse_equals_the_same_history_at_once(loaded: Pretrained, images: list[Image.Image]) -> None:
    session = ChatSession(loaded, settings=SETTINGS)
    for number, question in enumerate(QUESTIONS):
        said = ask(session, question, *images[:1] if number == 0 else ())
        assert said.strip() == session.messages[-1].text
        assert session.messages[-1].text == answer_alone(loaded, session.messages[:-1], images[:1])
    assert [message.role for message in session.messages] == ["user", "assistant"] * 3


def test_an_image_is_encoded_once_and_only_new_tokens_are_computed(
    loaded: Pretrained, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, fed = [], []
    encode, feed = LlavaModel.encode_images, ChatSession._feed
    monkeypatch.setattr(LlavaModel, "encode_images", lambda self, pixels: encoded.append(1) or encode(self, pixels))
    monkeypatch.setattr(ChatSession, "_feed", lambda self, ids, index: fed.append(len(ids)) or feed(self, ids, index))
    session = ChatSession(loaded, settings=SETTINGS)
    ask(session, QUESTIONS[0], images[0])
    first = fed[0]
    fed.clear()
    ask(session, QUESTIONS[1])
    assert len(encoded) == 1
    second = session.processor.encode_text(session.messages[:3], session._sizes, add_generation_prompt=True)
    assert len(second.input_ids) - fed[0] >= first  # at most the first answer and the second question
    ask(session, QUESTIONS[2], images[1])
    assert len(encoded) == 2


def test_a_later_image_and_several_at_once(loaded: Pretrained, images: list[Image.Image]) -> None:
    session = ChatSession(loaded, settings=SETTINGS)
    ask(session, QUESTIONS[0])
    ask(session, QUESTIONS[1], images[0])
    ask(session, QUESTIONS[2], images[1], images[0])
    shown = [images[0], images[1], images[0]]
    assert session.messages[-1].text == answer_alone(loaded, session.messages[:-1], shown)
    assert session.messages[4].content == (1, "\n", 2, "\n", QUESTIONS[2])
    assert session.prompt().count("<image>") == 3


def test_any_resolution_with_newlines(tokenizer: Tokenizer, images: list[Image.Image]) -> None:
    config = tiny_llava(
        text=tiny_text(vocab_size=len(tokenizer)),
        vision=tiny_vision(image_size=28, patch_size=14),
    )
    loaded = Pretrained(tiny_model(config), make_processor(tokenizer, ANYRES_SPEC), Path("tiny"))
    session = ChatSession(loaded, settings=SETTINGS)
    ask(session, QUESTIONS[0], images[0])
    ask(session, QUESTIONS[1], images[1])
    assert session.messages[-1].text == answer_alone(loaded, session.messages[:-1], images)


# ---- history ----


def test_the_history_is_exactly_the_templates(loaded: Pretrained, images: list[Image.Image]) -> None:
    session = ChatSession(loaded, settings=SETTINGS)
    first, second = (ask(session, QUESTIONS[0], images[0]).strip(), ask(session, QUESTIONS[1]).strip())
    assert session.prompt() == (
        f"{get_template('vicuna_v1').system} USER: <image>\n{QUESTIONS[0]} ASSISTANT: {first}</s>"
        f"USER: {QUESTIONS[1]} ASSISTANT: {second}</s>"
    )


def test_another_template_is_used_where_asked(loaded: Pretrained) -> None:
    session = ChatSession(loaded, get_template("chatml_direct"), SETTINGS)
    ask(session, QUESTIONS[0])
    assert "<|im_start|>user\nWhat is this?<|im_end|>" in session.prompt()
    assert loaded.processor is not None and loaded.processor.template.name == "vicuna_v1"


def test_a_question_is_text_and_nothing_else(loaded: Pretrained) -> None:
    """Neither `<image>` nor `</s>` in what is typed means anything."""
    session = ChatSession(loaded, settings=SETTINGS)
    ask(session, "Is <image> a tag, and </s> the end?")
    assert session.messages[0].image_indices == ()
    assert "USER: Is <image> a tag, and </s> the end? ASSISTANT:" in session.prompt()


def test_a_stored_seed_draws_the_same_answers(loaded: Pretrained) -> None:
    drawn = replace(SETTINGS, temperature=1.5, seed=4)
    answers = [ask(ChatSession(loaded, settings=settings), QUESTIONS[0]) for settings in (drawn, drawn, SETTINGS)]
    assert answers[0] == answers[1] != answers[2]


# ---- streaming ----


def test_a_character_of_several_tokens_is_never_split(
    loaded: Pretrained, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    text = "Ein 🚌 und ein 🐈, dann 鱼."  # the tokenizer has bytes for these only
    tokens = tokenizer.encode(text)
    assert len(tokens) > len(text)
    script(monkeypatch, [*tokens, tokenizer.eos_token_id])
    pieces = list(ChatSession(loaded, settings=GenerationSettings(max_new_tokens=100)).ask(QUESTIONS[0]))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 10  # and nothing waits longer than it must


def test_half_a_character_at_the_very_end_is_shown_as_such(
    loaded: Pretrained, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    tokens = tokenizer.encode("a 🚌")[:-2]
    script(monkeypatch, [*tokens, tokenizer.eos_token_id])
    assert ask(ChatSession(loaded, settings=SETTINGS), QUESTIONS[0]).startswith("a \ufffd")


def test_the_end_of_a_template_without_token_of_its_own_is_not_shown(
    loaded: Pretrained, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    script(monkeypatch, tokenizer.encode("It is # red.<|im_end|> and more"))
    session = ChatSession(loaded, get_template("chatml_direct"), GenerationSettings(max_new_tokens=100))
    pieces = list(session.ask(QUESTIONS[0]))
    assert "".join(pieces) == "It is # red."
    assert not any("<" in piece for piece in pieces)
    assert session.messages[-1].text == "It is # red."


def test_an_empty_answer_belongs_to_the_history(
    loaded: Pretrained, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    script(monkeypatch, [tokenizer.eos_token_id] * 2)
    session = ChatSession(loaded, settings=SETTINGS)
    assert [ask(session, question) for question in QUESTIONS[:2]] == ["", ""]
    assert [message.text for message in session.messages[1::2]] == ["", ""]


def test_an_answer_that_nobody_hears_to_its_end_is_kept_as_far_as_it_went(loaded: Pretrained) -> None:
    session = ChatSession(loaded, settings=SETTINGS)
    stream = session.ask(QUESTIONS[0])
    heard = "".join(itertools.islice(stream, 2))
    stream.close()  # type: ignore[attr-defined]
    assert session.messages[-1].text.startswith(heard.strip())
    ask(session, QUESTIONS[1])
    assert session.messages[-1].text == answer_alone(loaded, session.messages[:-1], [])


# ---- refusals ----


def test_a_conversation_that_became_too_long_stays_as_it_was(loaded: Pretrained, images: list[Image.Image]) -> None:
    session = ChatSession(loaded, settings=SETTINGS)
    ask(session, QUESTIONS[0], images[0])
    before = session.prompt()
    with pytest.raises(UserError, match="more than the model's context of 512 leaves room for; shorten it"):
        ask(session, "How many? " * 200, images[1])
    assert session.prompt() == before
    ask(session, QUESTIONS[1], images[1])
    assert session.messages[-1].text == answer_alone(loaded, session.messages[:-1], images)


def test_the_last_answer_ends_with_the_context(tokenizer: Tokenizer) -> None:
    text = tiny_text(vocab_size=len(tokenizer), max_position_embeddings=150)
    loaded = Pretrained(tiny_model(tiny_llava(text=text, vision=None)), make_processor(tokenizer), Path("tiny"))
    session = ChatSession(loaded, settings=GenerationSettings(max_new_tokens=10_000))
    ask(session, "How many?")
    assert len(session._ids) <= 150


def test_a_picture_needs_a_tower_and_words_a_tokenizer(world: World, loaded: Pretrained, images: list[Any]) -> None:
    session = ChatSession(load_pretrained(world.llama), settings=SETTINGS)
    with pytest.raises(UserError, match="the question has an image, but the model has no vision tower"):
        ask(session, QUESTIONS[0], images[0])
    assert session.messages == []
    with pytest.raises(UserError, match="has no tokenizer files, so it cannot chat"):
        ChatSession(replace(loaded, processor=None))


def test_generation_keeps_no_graph(loaded: Pretrained) -> None:
    session = ChatSession(loaded, settings=SETTINGS)
    ask(session, QUESTIONS[0])
    assert all(keys.stop_gradient for keys in session._cache._keys)
    assert paddle.is_grad_enabled()
