"""Batches of prompts: a row gives what it gives alone, and an answer ends where it should."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
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
from paddlemix.generation.incremental import IncrementalModel
from paddlemix.generation.sampling import GenerationSettings
from paddlemix.processors.text.known_templates import get_template
from paddlemix.processors.text.tokenizer import Tokenizer
from paddlemix.sample import Example, Message
from tests.tiny import ANYRES_SPEC, draw_picture, make_processor
from tests.tiny_models import tiny_llava, tiny_model, tiny_text, tiny_vision
from tests.tiny_world import World

GREEDY = GenerationSettings(max_new_tokens=12)


@pytest.fixture(scope="module")
def loaded(world: World) -> Pretrained:
    return load_pretrained(world.model)


@pytest.fixture(scope="module")
def ordinary(world: World) -> Pretrained:
    """The same with decoder weights as small as real ones: the world's are so large that float32 itself, with every
    kernel rounded exactly, stands at a hundred thousandth."""
    loaded = load_pretrained(world.model)
    for parameter in loaded.model.language_model.layers.parameters():
        if parameter.ndim == 2:
            parameter.set_value(parameter / 3)
    return loaded


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


def whole_scores(loaded: Pretrained, prompt: Example, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """Scores [V] behind a prompt and some tokens, everything computed at once."""
    ids = np.concatenate([prompt.input_ids, np.asarray(tokens, dtype=np.int64)])
    whole = replace(prompt, input_ids=ids, labels=ids)
    batch = collate([whole], loaded.model.config.tokens_per_tile)
    images: dict[str, Any] = {"pixel_values": batch.pixel_values, "merge_index": batch.merge_index}
    with paddle.no_grad():
        hidden = loaded.model(
            paddle.to_tensor(batch.input_ids),
            paddle.to_tensor(batch.position_ids),
            **{name: paddle.to_tensor(value) for name, value in images.items() if value is not None},
        )
        return loaded.model.logits(hidden[:, -1])[0].numpy()


def log_probability(loaded: Pretrained, prompt: Example, tokens: Sequence[int]) -> float:
    """Sum over the tokens of an answer."""
    total = 0.0
    for place, token in enumerate(tokens):
        scores = whole_scores(loaded, prompt, tokens[:place]).astype(np.float64)
        total += scores[token] - scores.max() - np.log(np.exp(scores - scores.max()).sum())
    return total


def without_cache(loaded: Pretrained, prompt: Example, count: int) -> list[int]:
    """Greedy tokens with the whole sequence run anew for each."""
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(int(whole_scores(loaded, prompt, tokens).argmax()))
    return tokens


def test_a_batch_gives_what_each_prompt_gives_alone(loaded: Pretrained, prompts: list[Example]) -> None:
    together = generate(loaded.model, prompts, GREEDY, set())
    assert together == [generate(loaded.model, [prompt], GREEDY, set())[0] for prompt in prompts]
    assert together == [without_cache(loaded, prompt, 12) for prompt in prompts]
    assert len({tuple(answer) for answer in together}) == 4
    assert all(len(set(answer)) > 1 for answer in together)


@pytest.fixture(scope="module")
def any_resolution(tokenizer: Tokenizer) -> Pretrained:
    """A model that cuts images into tiles, with newlines."""
    text, vision = tiny_text(vocab_size=len(tokenizer)), tiny_vision(image_size=28, patch_size=14)
    return Pretrained(
        tiny_model(tiny_llava(text=text, vision=vision)),
        make_processor(tokenizer, ANYRES_SPEC),
        None,  # type: ignore[arg-type]
    )


def mixed_prompts(loaded: Pretrained) -> list[Example]:
    """Eight: words alone, one to three images, short and long, also a later round."""
    assert loaded.processor is not None
    later = [
        Message(role="user", content=(0, "What is this?")),
        Message(role="assistant", content=("A bus.",)),
        Message(role="user", content=("And", 1, "?")),
    ]
    return [
        encode(loaded, 1, "What is this?"),
        encode(loaded, "How many?"),
        encode(loaded, 2, "\n", 3, "What is the colour of the big bus and where is the small cat?"),
        encode(loaded, "这是什么颜色?"),
        encode(loaded, 5, "Is ", 6, " larger than ", 7, "?"),
        loaded.processor.encode_prompt(later, [draw_picture(60, 30, 4), draw_picture(20, 70, 5)]),
        encode(loaded, "What is this? " * 12),
        encode(loaded, 8, ""),
    ]


@pytest.mark.parametrize("name", ["loaded", "any_resolution"])
def test_a_batch_of_eight_mixed_prompts_equals_eight_single_runs(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    prompts = mixed_prompts(model)
    together = generate(model.model, prompts, GREEDY, set())
    assert together == [generate(model.model, [prompt], GREEDY, set())[0] for prompt in prompts]
    assert len({len(prompt.input_ids) for prompt in prompts}) >= 6
    assert len({tuple(answer) for answer in together}) >= 6


@pytest.mark.parametrize("name", ["ordinary", "any_resolution"])
def test_cached_scores_equal_those_of_the_whole(name: str, request: pytest.FixtureRequest) -> None:
    """Every token of several answers, to a hundred thousandth."""
    loaded = request.getfixturevalue(name)
    for prompt in mixed_prompts(loaded)[:6]:
        incremental = IncrementalModel(loaded.model)
        scores, tokens = incremental.prefill([prompt]), []
        for _ in range(12):
            wanted = whole_scores(loaded, prompt, tokens)
            np.testing.assert_allclose(scores[0], wanted, atol=1e-5, rtol=0)
            tokens.append(int(scores.argmax()))
            scores = incremental.step(np.array(tokens[-1:]))


def test_rows_that_are_complete_leave(loaded: Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = mixed_prompts(loaded)
    whole, widths, feed = generate(loaded.model, prompts, GREEDY, set()), [], IncrementalModel.step

    def counted(self: IncrementalModel, tokens: np.ndarray) -> np.ndarray:
        widths.append(len(tokens))
        return feed(self, tokens)

    monkeypatch.setattr(IncrementalModel, "step", counted)
    ends = {answer[2] for answer in whole[:6]}
    expected = [list(itertools.takewhile(lambda token: token not in ends, answer)) for answer in whole]
    assert generate(loaded.model, prompts, GREEDY, ends) == expected
    assert min(widths) < 8


def test_draws_of_a_row_do_not_depend_on_when_others_end(loaded: Pretrained) -> None:
    settings = GenerationSettings(max_new_tokens=8, temperature=1.0, seed=3)
    prompts = mixed_prompts(loaded)[:3]
    whole = generate(loaded.model, prompts, settings, set())
    ended = generate(loaded.model, prompts, settings, {whole[0][1]})
    assert len(ended[0]) == 1 and ended[0] == whole[0][:1]
    assert [answer[: len(short)] for answer, short in zip(whole, ended, strict=True)] == ended


def test_a_text_ends_an_answer_of_a_batch(loaded: Pretrained) -> None:
    assert loaded.processor is not None
    tokenizer, prompts = loaded.processor.tokenizer, mixed_prompts(loaded)[:4]
    whole = generate(loaded.model, prompts, GREEDY, set())
    text = tokenizer.decode(whole[0])
    ending = Ending(frozenset(), (text[3:6],))
    answers = generate(loaded.model, prompts, GREEDY, set(), ending.reached(tokenizer))
    assert len(answers[0]) < len(whole[0])
    for short, long in zip(answers, whole, strict=True):
        assert short == long[: len(short)]
        assert ending.cut(tokenizer.decode(short))[0] == ending.cut(tokenizer.decode(long))[0]
    assert Ending(frozenset({2}), ()).reached(tokenizer) is None


def test_one_beam_for_each_is_the_greedy_answer_and_more_are_likelier(loaded: Pretrained) -> None:
    """By the sum of log probabilities, which a search without length penalty maximises."""
    prompts = mixed_prompts(loaded)
    greedy = generate(loaded.model, prompts, GREEDY, set())
    settings = GenerationSettings(max_new_tokens=12, num_beams=4)
    best = generate(loaded.model, prompts, settings, set())
    gains = [
        log_probability(loaded, prompt, found) - log_probability(loaded, prompt, plain)
        for prompt, found, plain in zip(prompts, best, greedy, strict=True)
    ]
    assert max(gains) > 0.1 and np.mean(gains) > 0


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
    with pytest.raises(UserError, match=r"has \d+ tokens, \d+ more than the model's context of 160 leaves room for"):
        generate(loaded.model, [encode(loaded, "How many?" * 80)], GREEDY, set())


@pytest.mark.parametrize(("length", "budget"), [(1, 20), (490, 20), (492, 20), (493, 19), (511, 1)])
def test_the_budget_of_an_answer(loaded: Pretrained, length: int, budget: int) -> None:
    assert answer_budget(loaded.model, length, 20) == budget


def test_a_full_context_is_refused(loaded: Pretrained) -> None:
    with pytest.raises(UserError, match="has 512 tokens, 1 more than the model's context of 512"):
        answer_budget(loaded.model, 512, 20)


def test_a_picture_needs_a_tower(loaded: Pretrained, world: World) -> None:
    with pytest.raises(UserError, match="the prompt has an image, but the model has no vision tower"):
        generate(load_pretrained(world.llama).model, [encode(loaded, 1, "What?")], GREEDY, set())


# ---- what ends an answer ----


def test_the_end_is_a_token_where_the_vocabulary_has_it(tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos_token_id
    chatml = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")
    for name, texts in (("vicuna_v1", ()), ("plain", ("\n",)), ("chatml_direct", chatml)):
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
