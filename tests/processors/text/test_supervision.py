"""The contract of training, for every template and any conversation: trained are the answers and what ends them.

Contents are made of what a parser of the prompt would trip over: role words of all templates, special tokens, `<image>`
and odd white space.  The vocabulary knows every special token, so one that were parsed out of a content would show.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddlemix.processors.llava import LlavaProcessor, TooLongError
from paddlemix.processors.text.chat_template import resolve_template
from paddlemix.processors.text.conversation import render
from paddlemix.processors.text.known_templates import TEMPLATES
from paddlemix.processors.text.template import SPECIAL_TOKENS, Template
from paddlemix.processors.text.tokenizer import Tokenizer, load_tokenizer
from paddlemix.sample import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Example, Message, Sample
from tests.tiny import ANYRES_SPEC, PAD_SPEC, make_processor, noise_picture

FILES = {
    "hashes.json": '{"system": "Be brief.", "conversation": ["### Q: {{user}}\\n", "### A: {{bot}}\\n###\\n"]}',
    "tags.json": '{"conversation": ["<|user|>{{user}}<|end|>\\n<|assistant|> ", "{{bot}} <|end|>\\n"]}',
}
SIZES = [(20, 30), (90, 20), (28, 28), (1, 60)]
WORDS = [
    "USER: ",
    " ASSISTANT: ",
    "ASSISTANT:",
    "###Human: ",
    "### A:",
    "[INST] ",
    " [/INST]",
    "<<SYS>>\n",
    "assistant\n",
]
WORDS += [
    "<bot>:",
    "<|User|>:",
    "<image>",
    "<Image>",
    "{content}",
    "{system}",
    "{{bot}}",
    "\n",
    "  ",
    "\t",
    "是",
    "a",
    ":",
]
WORDS += [*SPECIAL_TOKENS, "<unk>"]
TEXT = st.one_of(st.text(max_size=12), st.lists(st.sampled_from(WORDS), max_size=5).map("".join))
TEXT = TEXT.filter(lambda text: "▁" not in text)
ANSWER = TEXT.filter(str.strip)
CONTENT = st.lists(st.one_of(TEXT, st.just(0)), max_size=3)  # 0 stands for the next image


@pytest.fixture(scope="module")
def knowing(tokenizer_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The small tokenizer with an id for every special token of every template."""
    from transformers import LlamaTokenizer

    wider = LlamaTokenizer.from_pretrained(str(tokenizer_directory), legacy=False)
    wider.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    directory = tmp_path_factory.mktemp("knowing")
    wider.save_pretrained(str(directory))
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Template]:
    """Every built-in template and those of two files."""
    found = dict(TEMPLATES)
    for name, content in FILES.items():
        path = tmp_path_factory.mktemp("templates") / name
        path.write_text(content)
        found[name] = resolve_template(str(path))
    return found


def numbered(turns: list[tuple[list[Any], str]], captions: bool, system: str | None = None) -> Sample:
    """A sample of these contents, its images counted."""
    messages, count = [], 0
    if system is not None:
        messages.append(Message(role="system", content=(system,)))
    for content, answer in [([0], turns[0][1])] if captions else turns:
        pieces: list[str | int] = []
        for piece in content:
            pieces.append(piece if isinstance(piece, str) else count)
            count += not isinstance(piece, str)
        messages += [Message(role="user", content=tuple(pieces)), Message(role="assistant", content=(answer,))]
    return Sample(messages=tuple(messages), images=tuple(map(str, range(count))), source="train.json record 0")


def spelled(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The characters of ids, special tokens as they are written, every space there is."""
    text = b""
    for piece in tokenizer._hf.convert_ids_to_tokens(ids):
        is_byte = len(piece) == 6 and piece.startswith("<0x")
        text += bytes([int(piece[3:5], 16)]) if is_byte else piece.replace("▁", " ").encode()
    return text.decode()


def stretches(example: Example) -> list[list[int]]:
    """Ids of each run of trained positions."""
    trained = np.append(example.labels != IGNORE_INDEX, False)
    np.testing.assert_array_equal(example.labels[trained[:-1]], example.input_ids[trained[:-1]])
    edges = np.flatnonzero(np.diff(np.concatenate([[False], trained]).astype(int)))
    return [example.input_ids[start:end].tolist() for start, end in zip(edges[::2], edges[1::2], strict=True)]


NAMES = [*sorted(TEMPLATES), *FILES]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(turns=st.lists(st.tuples(CONTENT, ANSWER), min_size=1, max_size=3), own=st.none() | TEXT, anyres=st.booleans())
def test_trained_is_exactly_answers_and_ends(
    templates: dict[str, Template],
    knowing: Tokenizer,
    name: str,
    turns: list[tuple[list[Any], str]],
    own: str | None,
    anyres: bool,
) -> None:
    template = templates[name]
    system = own if template.first_user else None
    sample = numbered(turns, template.captions, system)
    processor = make_template_processor(knowing, template, anyres)
    sizes = [SIZES[index % len(SIZES)] for index in range(len(sample.images))]
    example = processor.encode_text(sample.messages, sizes)

    answers = [message.text for message in sample.messages if message.role == "assistant"]
    before = " " * template.captions  # text behind an image begins a word
    wanted = [before + template.answer.replace("{content}", answer, 1) + template.end for answer in answers]
    assert [spelled(knowing, ids) for ids in stretches(example)] == wanted

    assert own_ids(knowing, example) == own_ids(knowing, neutral(processor, sample, sizes))

    shown = [piece for piece in render(template, sample.messages) if piece.kind != "image"]
    text_ids = example.input_ids[example.input_ids != IMAGE_TOKEN_INDEX].tolist()[1:]
    everything = spelled(knowing, text_ids).replace(" ", "")
    assert everything == "".join(piece.text for piece in shown).replace(" ", "")


def make_template_processor(tokenizer: Tokenizer, template: Template, anyres: bool) -> LlavaProcessor:
    return replace(make_processor(tokenizer, ANYRES_SPEC if anyres else PAD_SPEC), template=template)


def own_ids(tokenizer: Tokenizer, example: Example) -> list[int]:
    """The special tokens of an example, in order."""
    known = {tokenizer.special_id(token) for token in (*SPECIAL_TOKENS, "<unk>")}
    return [index for index in example.input_ids.tolist() if index in known]


def neutral(processor: LlavaProcessor, sample: Sample, sizes: list[tuple[int, int]]) -> Example:
    """The same conversation with a plain word for every text that is not white space alone."""
    messages = [
        replace(
            message,
            content=tuple("x" if str(piece).strip() and isinstance(piece, str) else piece for piece in message.content),
        )
        for message in sample.messages
    ]
    return processor.encode_text(messages, sizes)


@pytest.mark.parametrize("policy", ["truncate_turns", "skip", "error"])
@settings(max_examples=60)
@given(
    turns=st.lists(st.tuples(CONTENT, ANSWER), min_size=1, max_size=4),
    share=st.floats(0.3, 1.1),
    anyres=st.booleans(),
)
def test_measured_is_what_encoding_gives(
    tokenizer: Tokenizer, policy: str, turns: list[tuple[list[Any], str]], share: float, anyres: bool
) -> None:
    sample = numbered(turns, captions=False)
    processor = make_processor(tokenizer, ANYRES_SPEC if anyres else PAD_SPEC)
    sizes = [SIZES[index % len(SIZES)] for index in range(len(sample.images))]
    images = [noise_picture(*size) for size in sizes]
    whole = processor.encode_text(sample.messages, sizes)
    limit = int(share * len(whole.input_ids))
    try:
        encoded = processor.encode(sample, images, limit, policy)
    except TooLongError as error:
        assert len(whole.input_ids) > limit
        with pytest.raises(TooLongError) as measured:
            processor.measure(sample, sizes, limit, policy)
        assert str(measured.value) == str(error)
        return
    assert processor.measure(sample, sizes, limit, policy) == (len(encoded.input_ids), len(encoded.image_index))
    assert len(encoded.input_ids) <= limit and encoded.num_supervised
    assert (encoded.input_ids == IMAGE_TOKEN_INDEX).sum() == len(encoded.image_index)
    np.testing.assert_array_equal(encoded.input_ids, whole.input_ids[: len(encoded.input_ids)])
    assert policy == "truncate_turns" or len(encoded.input_ids) == len(whole.input_ids)
