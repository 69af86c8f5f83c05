"""Batches of prompts: a row gives what it gives alone, and an answer ends where it should."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest

from paddlemix.checkpoints.load import load_pretrained
from paddlemix.checkpoints.pretrained import Pretrained
from paddlemix.datasets.collate import collate
from paddlemix.errors import UserError
from paddlemix.generation.ending import Ending, ending_of
from paddlemix.generation.generate import answer_budget, generate
from paddlemix.generation.sampling import GenerationSettings
from paddlemix.processors.templates import get_template
from paddlemix.processors.tokenizer import Tokenizer
from paddlemix.sample import Example, Message
from tests.tiny import draw_picture, make_processor
from tests.tiny_models import tiny_llava, tiny_model, tiny_text
from tests.tiny_world import World

GREEDY = GenerationSettings(max_new_tokens=12)


@pytest.fixture(scope="module")
def loaded(world: World) -> Pretrained:
    return load_pretrained(world.model)


def encode(loaded: Pretrained, *content: str | int) -> Example:
    """A prompt of one question; a number stands for an image of its own."""
    assert loaded.processor is not None
    numbers = [part for part in content if isinstance(part, int)]
    parts = tuple(numbers.index(part) if isinstance(part, int) else part for part in content)
    images = [draw_picture(30 + 9 * number, 40, number) for number in numbers]
    return loaded.processor.encode_prompt([Message(role="user", content=parts)], images)


@pytest.fixture(scope="module")
def prompts(loaded: Pretrained) -> list[Example]:
    return [
        encode(loaded, 1, "What is this?"),
        encode(loaded, "How many?"),
        encode(loaded, 2, "\n", 3, "What is the colour of the big bus and where is the small cat?"),
        encode(loaded, "这是什么颜色?"),
    ]


def without_cache(loaded: Pretrained, prompt: Example, count: int) -> list[int]:
    """Greedy tokens with the whole sequence run anew for each."""
    tokens: list[int] = []
    for _ in range(count):
        ids = np.concatenate([prompt.input_ids, np.array(tokens, dtype=np.int64)])
        whole = Example(input_ids=ids, labels=ids, pixel_values=prompt.pixel_values, image_index=prompt.image_index)
        batch = collate([whole], loaded.model.config.tokens_per_tile)
        images: dict[str, Any] = {"pixel_values": batch.pixel_values, "merge_index": batch.merge_index}
        with paddle.no_grad():
            hidden = loaded.model(
                paddle.to_tensor(batch.input_ids),
                paddle.to_tensor(batch.position_ids),
                **{name: paddle.to_tensor(value) for name, value in images.items() if value is not None},
            )
            tokens.append(int(loaded.model.logits(hidden[:, -1]).argmax()))
    return tokens


def test_a_batch_gives_what_each_prompt_gives_alone(loaded: Pretrained, prompts: list[Example]) -> None:
    together = generate(loaded.model, prompts, GREEDY, set())
    assert together == [generate(loaded.model, [prompt], GREEDY, set())[0] for prompt in prompts]
    assert together == [without_cache(loaded, prompt, 12) for prompt in prompts]
    assert len({tuple(answer) for answer in together}) == 4
    assert all(len(set(answer)) > 1 for answer in together)


def test_an_answer_ends_before_an_end_token_and_the_others_go_on(loaded: Pretrained, prompts: list[Example]) -> None:
    whole = generate(loaded.model, prompts, GREEDY, set())
    end = whole[1][3]
    expected = [answer[: answer.index(end)] if end in answer else answer for answer in whole]
    assert generate(loaded.model, prompts, GREEDY, {end}) == expected
    assert len({len(answer) for answer in expected}) > 1


def test_an_answer_is_no_longer_than_asked(loaded: Pretrained, prompts: list[Example]) -> None:
    for count in (1, 2):
        answers = generate(loaded.model, prompts, GenerationSettings(max_new_tokens=count), set())
        assert [len(answer) for answer in answers] == [count] * 4


def test_no_prompt_gives_no_answer(loaded: Pretrained) -> None:
    assert generate(loaded.model, [], GREEDY, set()) == []


def test_an_answer_ends_with_the_models_context(tokenizer: Tokenizer) -> None:
    """Each row at its own place, as it would alone."""
    limit = 160
    text = tiny_text(vocab_size=len(tokenizer), max_position_embeddings=limit)
    loaded = Pretrained(tiny_model(tiny_llava(text=text, vision=None)), make_processor(tokenizer), None)  # type: ignore[arg-type]
    prompts = [encode(loaded, "How many?" * count) for count in (1, 12)]
    lengths = [len(prompt.input_ids) for prompt in prompts]
    answers = generate(loaded.model, prompts, GenerationSettings(max_new_tokens=100), set())
    assert [len(answer) for answer in answers] == [min(100, limit - length) for length in lengths]
    assert len(answers[1]) < 100
    with pytest.raises(UserError, match=r"takes \d+ tokens, \d+ more than the model's context of 160 leaves room for"):
        generate(loaded.model, [encode(loaded, "How many?" * 80)], GREEDY, set())


@pytest.mark.parametrize(("length", "budget"), [(1, 20), (490, 20), (492, 20), (493, 19), (511, 1)])
def test_the_budget_of_an_answer(loaded: Pretrained, length: int, budget: int) -> None:
    assert answer_budget(loaded.model, length, 20) == budget


def test_a_full_context_is_refused(loaded: Pretrained) -> None:
    with pytest.raises(UserError, match="takes 512 tokens, 1 more than the model's context of 512"):
        answer_budget(loaded.model, 512, 20)


def test_a_picture_needs_a_tower(loaded: Pretrained, world: World) -> None:
    with pytest.raises(UserError, match="the prompt has an image, but the model has no vision tower"):
        generate(load_pretrained(world.llama).model, [encode(loaded, 1, "What?")], GREEDY, set())


# ---- what ends an answer ----


def test_the_end_is_a_token_where_the_vocabulary_has_it(tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos_token_id
    for name, texts in (("vicuna_v1", ()), ("plain", ("\n",)), ("chatml_direct", ("<|im_end|>",))):
        assert ending_of(make_processor(tokenizer, template=name)) == Ending(frozenset({eos}), texts)
    assert get_template("vicuna_v1").end == "</s>"


def test_a_text_is_cut_at_its_first_end() -> None:
    ending = Ending(frozenset(), ("###", "\n"))
    assert ending.cut("a # b") == ("a # b", False)
    assert ending.cut("a\nb###c") == ("a", True)
    assert ending.cut("###") == ("", True)


@pytest.mark.parametrize(
    ("text", "certain"),
    [("red", 3), ("red#", 3), ("red##", 3), ("r#d", 3), ("红\ufffd", 1), ("\ufffd\ufffd", 0), ("a\ufffdb", 3), ("", 0)],
)
def test_what_later_tokens_may_still_change_is_held_back(text: str, certain: int) -> None:
    assert Ending(frozenset(), ("###",)).certain_length(text) == certain
