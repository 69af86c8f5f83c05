"""Conversations: reuse changes nothing, an image is encoded once, history is the template's, no character is split."""

from __future__ import annotations

import itertools
import logging
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
from paddlemix.generation.history import Dropped
from paddlemix.generation.incremental import IncrementalModel, NewTokens
from paddlemix.generation.sampling import GenerationSettings, Sampler
from paddlemix.models.kv_cache import KVCache
from paddlemix.models.llava import LlavaModel
from paddlemix.processors.text.known_templates import get_template
from paddlemix.processors.text.tokenizer import Tokenizer
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


def answer_alone(
    loaded: Pretrained,
    messages: list[Message],
    images: list[Image.Image],
    settings: GenerationSettings = SETTINGS,
) -> str:
    """The answer to a history, computed in one go by the batch path, without a cache from before."""
    assert loaded.processor is not None
    prompt = loaded.processor.encode_prompt(messages, images)
    tokenizer = loaded.processor.tokenizer
    return tokenizer.decode(generate(loaded.model, [prompt], settings, {tokenizer.eos_token_id})[0]).strip()


def script(monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> None:
    """The model then answers with these tokens."""
    rest: Iterator[int] = iter(tokens)
    monkeypatch.setattr(Sampler, "next_token", lambda self, scores: next(rest))


# ---- reuse ----


def test_every_round_with_reuse_equals_the_same_history_at_once(loaded: Pretrained, images: list[Image.Image]) -> None:
    session = ChatSession(loaded, settings=SETTINGS)
    for number, question in enumerate(QUESTIONS):
        said = ask(session, question, *images[:1] if number == 0 else ())
        assert said.strip() == session.messages[-1].text
        assert session.messages[-1].text == answer_alone(loaded, session.messages[:-1], images[:1])
    assert [message.role for message in session.messages] == ["user", "assistant"] * 3


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """What is computed: tiles through the tower, and tokens read at once."""
    done: dict[str, list[int]] = {"tiles": [], "read": []}
    encode, read = LlavaModel.encode_images, IncrementalModel.extend

    def encode_images(self: LlavaModel, pixels: paddle.Tensor) -> paddle.Tensor:
        done["tiles"].append(pixels.shape[0])
        return encode(self, pixels)

    def read_tokens(self: IncrementalModel, tokens: NewTokens, greedy: bool) -> np.ndarray:
        done["read"].append(len(tokens.input_ids))
        return read(self, tokens, greedy)

    monkeypatch.setattr(LlavaModel, "encode_images", encode_images)
    monkeypatch.setattr(IncrementalModel, "extend", read_tokens)
    return done


def test_an_image_is_encoded_once_and_only_new_tokens_are_computed(
    loaded: Pretrained, images: list[Image.Image], work: dict[str, list[int]]
) -> None:
    session = ChatSession(loaded, settings=SETTINGS)
    ask(session, QUESTIONS[0], images[0])
    ask(session, QUESTIONS[1])
    assert work["tiles"] == [1]
    assert work["read"][1] < 40 < work["read"][0]  # at most the first answer, and the second question
    ask(session, QUESTIONS[2], images[1])
    assert work["tiles"] == [1, 1]


def test_equal_prompts_about_another_image_share_nothing_of_it(
    loaded: Pretrained, images: list[Image.Image], work: dict[str, list[int]]
) -> None:
    """The ids of both are the same."""
    session = ChatSession(loaded, settings=SETTINGS)
    ask(session, QUESTIONS[0], images[0])
    session.back()
    ask(session, QUESTIONS[0], images[1])
    assert work["tiles"] == [1, 1]
    assert session.rounds[-1].answer == answer_alone(loaded, session.messages[:-1], images[1:])


def test_going_back_and_editing_reuse_what_is_the_same(
    loaded: Pretrained, images: list[Image.Image], work: dict[str, list[int]]
) -> None:
    session = ChatSession(loaded, settings=SETTINGS)
    answers = [ask(session, QUESTIONS[0], images[0]), *(ask(session, question) for question in QUESTIONS[1:])]
    session.back(2)
    assert [message.role for message in session.messages] == ["user", "assistant"]
    del work["read"][:]
    assert ask(session, QUESTIONS[1]) == answers[1]
    assert work["read"][0] < 60 and work["tiles"] == [1]

    edited = "".join(session.edit(1, QUESTIONS[2]))
    assert [item.question[-1] for item in session.rounds] == [QUESTIONS[2]]
    assert work["tiles"] == [1] and work["read"][-1] < 60  # behind the image, which the cache still holds
    assert edited.strip() == answer_alone(loaded, session.messages[:-1], images[:1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda session: list(session.edit(2, "?")), "there is no round 2 to edit; the conversation has 1"),
        (lambda session: session.back(2), "cannot go back 2 rounds; the conversation has 1"),
        (lambda session: session.back(0), "cannot go back 0 rounds"),
    ],
)
def test_there_is_nothing_to_go_back_to(loaded: Pretrained, call: Any, message: str) -> None:
    session = ChatSession(loaded, settings=SETTINGS)
    ask(session, QUESTIONS[0])
    with pytest.raises(UserError, match=message):
        call(session)
    assert len(session.rounds) == 1


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
    """`</s>` in what is typed means nothing."""
    session = ChatSession(loaded, settings=SETTINGS)
    ask(session, "Is this, </s>, the end?")
    assert "USER: Is this, </s>, the end? ASSISTANT:" in session.prompt()


def test_a_question_may_say_where_its_images_stand(loaded: Pretrained, images: list[Image.Image]) -> None:
    session = ChatSession(loaded, settings=SETTINGS)
    ask(session, "Is <image> larger than <image>?", *images)
    assert session.messages[0].content == ("Is ", 0, " larger than ", 1, "?")
    assert session.rounds[-1].answer == answer_alone(loaded, session.messages[:-1], images)


@pytest.mark.parametrize(
    ("question", "count", "message"),
    [
        ("What is <image>?", 0, "the question has <image> 1 times, but no image was given"),
        ("<image> or <image>?", 1, "the question has <image> 2 times, but 1 image was given"),
        (
            "What is <image>?",
            2,
            "the question has <image> 1 times, but 2 images were given; give one for each, or leave",
        ),
    ],
)
def test_images_and_their_places_must_agree(
    loaded: Pretrained, images: list[Image.Image], question: str, count: int, message: str
) -> None:
    session = ChatSession(loaded, settings=SETTINGS)
    with pytest.raises(UserError, match=message):
        ask(session, question, *images[:count])
    assert session.rounds == []


def test_a_system_text_takes_the_place_of_the_templates(loaded: Pretrained) -> None:
    session = ChatSession(loaded, settings=SETTINGS, system="Be brief.")
    ask(session, QUESTIONS[0])
    assert session.prompt().startswith(f"Be brief. USER: {QUESTIONS[0]} ASSISTANT:")
    assert session.messages[0] == Message(role="system", content=("Be brief.",))
    with pytest.raises(UserError, match="template 'gemma_instruct' has no place for a system text"):
        ChatSession(loaded, get_template("gemma_instruct"), SETTINGS, system="Be brief.")


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


@pytest.mark.parametrize("layer_call", [3, 8])
def test_an_answer_that_is_interrupted_anywhere_leaves_a_conversation_that_goes_on(
    loaded: Pretrained, monkeypatch: pytest.MonkeyPatch, form: str, layer_call: int, images: list[Image.Image]
) -> None:
    """In the middle of a token, when some layers have seen it and others have not."""
    name = "advance" if form == "compiled" else "write"  # what adds a token to a layer
    session, add, calls = ChatSession(loaded, settings=SETTINGS), getattr(KVCache, name), itertools.count()

    def interrupted(self: KVCache, *arguments: Any) -> Any:
        if next(calls) == layer_call:
            raise KeyboardInterrupt
        return add(self, *arguments)

    monkeypatch.setattr(KVCache, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(session, QUESTIONS[0], images[0])
    assert len(session.rounds) == 1
    ask(session, QUESTIONS[1])
    assert session.rounds[-1].answer == answer_alone(loaded, session.messages[:-1], images[:1])


def test_further_texts_end_an_answer(loaded: Pretrained, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    script(monkeypatch, tokenizer.encode("It is red. Or green. Or both."))
    session = ChatSession(loaded, settings=GenerationSettings(max_new_tokens=100, stop=(" Or b", "yellow")))
    pieces = list(session.ask(QUESTIONS[0]))
    assert "".join(pieces) == "It is red. Or green."
    assert session.rounds[-1].answer == "It is red. Or green."


def test_the_pieces_are_the_text_whatever_the_tokens(loaded: Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random ids, bytes that are no character among them."""
    assert loaded.processor is not None
    tokenizer, random = loaded.processor.tokenizer, np.random.default_rng(3)
    for _ in range(20):
        tokens = [int(token) for token in random.integers(3, len(tokenizer), 40)]
        with monkeypatch.context() as patch:
            script(patch, [*tokens, tokenizer.eos_token_id])
            pieces = list(ChatSession(loaded, settings=GenerationSettings(max_new_tokens=100)).ask(QUESTIONS[0]))
        assert "".join(pieces) == tokenizer.decode(tokens).lstrip()


# ---- beams ----


def test_the_best_beam_is_that_of_the_whole_history(loaded: Pretrained, images: list[Image.Image]) -> None:
    beams = replace(SETTINGS, num_beams=3, repetition_penalty=1.3)
    session = ChatSession(loaded, settings=beams)
    for number, question in enumerate(QUESTIONS):
        said = session.answer(question, images[:1] if number == 0 else ())
        assert said == answer_alone(loaded, session.messages[:-1], images[:1], beams)
    assert len(session.rounds) == 3


def test_beams_and_streaming_exclude_each_other(loaded: Pretrained) -> None:
    session = ChatSession(loaded, settings=replace(SETTINGS, num_beams=3))
    with pytest.raises(UserError, match="num_beams 3: beam search cannot stream an answer"):
        ask(session, QUESTIONS[0])
    assert session.rounds == []


def test_a_whole_answer_is_the_streamed_one(loaded: Pretrained, images: list[Image.Image]) -> None:
    first, second = (ChatSession(loaded, settings=SETTINGS) for _ in range(2))
    assert first.answer(QUESTIONS[0], images) == ask(second, QUESTIONS[0], *images).strip()


# ---- a conversation that outgrows the context ----


def test_the_oldest_rounds_make_room_with_their_images(
    loaded: Pretrained, images: list[Image.Image], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("paddlemix"), "propagate", True)
    session = ChatSession(loaded, settings=SETTINGS, on_overflow="drop_oldest")
    ask(session, QUESTIONS[0], images[0])
    ask(session, QUESTIONS[1], images[1])
    assert session.dropped is None
    ask(session, "How many? " * 130)
    assert session.dropped == Dropped(rounds=1, images=1)
    assert "outgrew the model's context: the oldest round and the image it showed left out" in caplog.text
    assert [len(item.pictures) for item in session.rounds] == [1, 0]
    assert session.messages[0].image_indices == (0,)
    assert session.rounds[-1].answer == answer_alone(loaded, session.messages[:-1], images[1:])
    ask(session, "How many? " * 130)
    assert session.dropped == Dropped(rounds=2, images=1)
    assert session.rounds[-1].answer == answer_alone(loaded, session.messages[:-1], [])


def test_a_question_that_is_too_long_alone_is_refused_all_the_same(loaded: Pretrained) -> None:
    session = ChatSession(loaded, settings=SETTINGS, on_overflow="drop_oldest")
    ask(session, QUESTIONS[0])
    with pytest.raises(UserError, match="more than the model's context of 512 leaves room for"):
        ask(session, "How many? " * 200)
    assert len(session.rounds) == 1
    with pytest.raises(UserError, match="on_overflow='drop' is not one of stop, drop_oldest"):
        ChatSession(loaded, on_overflow="drop")


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
    assert session._incremental.cache.length == 149  # the last token needs no place


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
    assert all(layer.keys.stop_gradient for layer in session._incremental.cache._layers)
    assert paddle.is_grad_enabled()
