"""Sample -> Example: the reference's ids and labels, supervision that is exactly "answer + end", images in place."""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from paddlemix.datasets.forms.parse import parse_record
from paddlemix.errors import MissingFileError, UserError
from paddlemix.processors import llava
from paddlemix.processors.images.image_config import image_spec_from_dict
from paddlemix.processors.images.tiles import preprocess_image
from paddlemix.processors.images.visual_tokens import count_visual_tokens, visual_token_index
from paddlemix.processors.llava import LlavaProcessor, TooLongError, processor_from_dict
from paddlemix.processors.text.conversation import prompt_text, render
from paddlemix.processors.text.known_templates import TEMPLATES, get_template, template_names
from paddlemix.processors.text.tokenizer import Tokenizer
from paddlemix.sample import IGNORE_INDEX, IMAGE_TOKEN_INDEX, NEWLINE_INDEX, Example, Message
from tests.golden_conversations import VOCABULARIES, case_name, golden_cases, golden_tokenizer
from tests.tiny import ANYRES_SPEC, PAD_SPEC, make_processor, make_sample, noise_picture

CASES = [case for case in golden_cases() if case["version"] in template_names()]

# Texts that a parser of the rendered prompt would trip over.
ODD = [
    "USER: ",
    "ASSISTANT:",
    " ASSISTANT: ",
    "</s>",
    "<s>",
    "<unk>",
    "<image>",
    "\n",
    "  ",
    "\t",
    "###",
    ":",
    "是",
    "a",
]
ANSWER = st.one_of(st.text(max_size=20), st.lists(st.sampled_from(ODD), max_size=6).map("".join))
ANSWER = ANSWER.filter(lambda text: text.strip() and "▁" not in text)
QUESTION = ANSWER.map(lambda text: text.replace("<image>", ""))


@pytest.fixture(scope="module")
def processor(tokenizer: Tokenizer) -> LlavaProcessor:
    return make_processor(tokenizer)


def one_token_an_image(example: Example) -> tuple[list[int], list[int]]:
    """Ids and labels with each image's run of visual tokens cut to one, as the reference has them."""
    ids = example.input_ids
    kept = ~((ids == IMAGE_TOKEN_INDEX) & (np.roll(ids, 1) == IMAGE_TOKEN_INDEX))
    return ids[kept].tolist(), example.labels[kept].tolist()


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_golden_ids_and_labels(case: dict[str, Any]) -> None:
    record = {"conversations": case["conversations"], "image": "a.png" if case["has_image"] else None}
    sample = parse_record(record, "golden")
    processor = make_processor(golden_tokenizer(case["vocabulary"], case["legacy"]), template=case["version"])
    ids, labels = one_token_an_image(processor.encode_text(sample.messages, [(640, 480)]))
    assert ids == case["input_ids"]
    assert labels == case["labels"] or case["labels"] is None


def supervised_parts(example: Example, tokenizer: Tokenizer) -> list[str]:
    """Each stretch of trained positions, decoded, its `</s>` cut off after a check that it is there."""
    trained = example.labels != IGNORE_INDEX
    np.testing.assert_array_equal(example.labels[trained], example.input_ids[trained])
    starts = np.flatnonzero(trained & ~np.roll(trained, 1))
    parts = []
    for start in starts:
        length = np.argmin(np.append(trained[start:], False))
        stretch = example.input_ids[start : start + length].tolist()
        assert stretch[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in stretch[:-1]
        parts.append(tokenizer.decode(stretch[:-1]))
    return parts


@given(turns=st.lists(st.tuples(QUESTION, ANSWER), min_size=1, max_size=4), with_image=st.booleans())
@example(turns=[("Q", "USER: a ASSISTANT: b</s>USER: c")], with_image=True)
@example(turns=[("ASSISTANT: x</s>", "  <image>\n ")], with_image=True)
@example(turns=[("Q", "\n1\n\n2 \n"), ("</s>", "</s>")], with_image=False)
def test_supervised_is_answer_and_end(
    processor: LlavaProcessor, tokenizer: Tokenizer, turns: list[tuple[str, str]], with_image: bool
) -> None:
    texts = [text for turn in turns for text in turn]
    texts[0] = "<image>\n" * with_image + texts[0]
    encoded = processor.encode_text(make_sample(*texts).messages, [(20, 30)])
    assert supervised_parts(encoded, tokenizer) == [answer for _, answer in turns]
    assert encoded.num_supervised == (encoded.labels != IGNORE_INDEX).sum()


@given(
    st.lists(ANSWER.filter(lambda text: "<s>" not in text and "</s>" not in text and "<unk>" not in text), min_size=2)
)
def test_piecewise_equals_joint(processor: LlavaProcessor, tokenizer_directory: Path, texts: list[str]) -> None:
    """Without images, the ids are those of the reference's tokenizer on the whole prompt."""
    texts = [text.replace("<image>", "") or "?" for text in texts[: len(texts) // 2 * 2]]
    texts = [text if text.strip() else "?" for text in texts]
    messages = make_sample(*texts).messages
    joint = joint_ids(tokenizer_directory, prompt_text(render(processor.template, messages)))
    assert processor.encode_text(messages, []).input_ids.tolist() == joint


@pytest.mark.parametrize("vocabulary", VOCABULARIES, ids=lambda path: path.parent.name)
def test_piecewise_equals_joint_on_odd_texts(vocabulary: Path) -> None:
    texts = ["What's >this<?  ", "  It is 3.14: 你好\n\n", "\tfoo_bar(x);", "Yes", "…", "🙂 ok"]
    processor = make_processor(golden_tokenizer(vocabulary, legacy=False))
    messages = make_sample(*texts).messages
    joint = joint_ids(vocabulary, prompt_text(render(processor.template, messages)))
    assert processor.encode_text(messages, []).input_ids.tolist() == joint


def joint_ids(directory: Path | None, prompt: str) -> list[int]:
    return reference_tokenizer(str(directory)).encode(prompt)


@cache
def reference_tokenizer(directory: str) -> Any:
    from transformers import LlamaTokenizer

    return LlamaTokenizer.from_pretrained(directory, legacy=False)


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"plain"}))
def test_supervised_ids_of_every_template(tokenizer: Tokenizer, name: str) -> None:
    template, answers = TEMPLATES[name], ["It is red.", "</s> 是\n"]
    messages = make_sample("<image>\nWhat?", answers[0], "Where?", answers[1]).messages
    encoded = make_processor(tokenizer, template=name).encode_text(messages, [(9, 9)])
    trained = encoded.labels != IGNORE_INDEX
    np.testing.assert_array_equal(encoded.labels[trained], encoded.input_ids[trained])
    starts = np.flatnonzero(trained & ~np.roll(trained, 1))
    stretches = [encoded.labels[a:b][trained[a:b]] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    expected = [template.answer.replace("{content}", answer) + template.end for answer in answers]
    decoded = [tokenizer.decode(stretch.tolist(), skip_special_tokens=False) for stretch in stretches]
    assert [text.strip(" ") for text in decoded] == [text.strip(" ") for text in expected]


def test_special_token_that_the_vocabulary_lacks_is_text(processor: LlavaProcessor, tokenizer: Tokenizer) -> None:
    other = replace(processor, template=replace(processor.template, end="<|im_end|>"))
    encoded = other.encode_text(make_sample("Q", "red", "Q", "big").messages, [])
    trained = [index for index in encoded.labels.tolist() if index != IGNORE_INDEX]
    assert tokenizer.decode(trained) == "red<|im_end|> big<|im_end|>"


def test_anyres_images_in_place(tokenizer: Tokenizer) -> None:
    sizes = [(60, 40), (20, 90), (28, 28)]
    images = [noise_picture(*size, seed=index) for index, size in enumerate(sizes)]
    sample = make_sample("Is <image> like <image>?", "No", "<image>\nAnd this?", "Yes")
    encoded = make_processor(tokenizer, ANYRES_SPEC).encode(sample, images)
    expected = np.concatenate([preprocess_image(image, ANYRES_SPEC) for image in images])
    np.testing.assert_array_equal(encoded.pixel_values, expected)
    assert (encoded.input_ids == IMAGE_TOKEN_INDEX).sum() == len(encoded.image_index)
    first_row, start = 0, 0
    for size, image in zip(sizes, images, strict=True):
        index = visual_token_index(*size, ANYRES_SPEC)
        own = encoded.image_index[start : start + len(index)]
        np.testing.assert_array_equal(own, np.where(index == NEWLINE_INDEX, NEWLINE_INDEX, index + first_row))
        first_row += 4 * len(preprocess_image(image, ANYRES_SPEC))
        start += len(index)
    assert start == len(encoded.image_index)
    assert (encoded.labels[encoded.input_ids == IMAGE_TOKEN_INDEX] == IGNORE_INDEX).all()


@given(width=st.integers(1, 200), height=st.integers(1, 200), anyres=st.booleans())
def test_length_is_known_without_pixels(tokenizer: Tokenizer, width: int, height: int, anyres: bool) -> None:
    processor = make_processor(tokenizer, ANYRES_SPEC if anyres else PAD_SPEC)
    sample = make_sample("<image>\nWhat?", "A cat.")
    text = processor.encode_text(sample.messages, [(width, height)])
    whole = processor.encode(sample, [noise_picture(width, height)])
    np.testing.assert_array_equal(text.input_ids, whole.input_ids)
    np.testing.assert_array_equal(text.image_index, whole.image_index)
    assert text.pixel_values.shape == (0, 3, 28, 28)
    assert len(text.image_index) == count_visual_tokens(width, height, processor.image_spec)


def test_prompt_is_the_beginning_of_the_training_example(processor: LlavaProcessor) -> None:
    sample, images = make_sample("<image>\nOne?", "1", "Two?", "2"), [noise_picture(30, 40)]
    trained, prompt = processor.encode(sample, images), processor.encode_prompt(sample.messages[:-1], images)
    length = len(prompt.input_ids)
    np.testing.assert_array_equal(trained.input_ids[:length], prompt.input_ids)
    assert trained.labels[length] != IGNORE_INDEX
    np.testing.assert_array_equal(trained.labels[:length], prompt.labels)
    np.testing.assert_array_equal(prompt.pixel_values, trained.pixel_values)


def test_text_only_sample(processor: LlavaProcessor) -> None:
    encoded = processor.encode(make_sample("Hello!", "Hi"), [])
    assert encoded.pixel_values.shape == (0, 3, 28, 28)
    assert encoded.image_index.shape == (0,)
    assert encoded.input_ids[0] == 1
    assert encoded.source == "test.json record 0"


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is warned of during the test, as if the process had not warned before."""
    seen: list[str] = []
    monkeypatch.setattr(logging.getLogger("paddlemix"), "warning", lambda text, *values: seen.append(text % values))
    monkeypatch.setattr(llava, "_truncations", itertools.count(1))
    return seen


def test_long_sample_loses_its_last_pairs_and_their_images(processor: LlavaProcessor, warnings: list[str]) -> None:
    images = [noise_picture(30, 40, seed) for seed in range(2)]
    sample = make_sample("<image>\nOne?", "1", "Two?", "2", "<image>\nThree?", "3")
    short = processor.encode(make_sample("<image>\nOne?", "1", "Two?", "2"), images[:1])
    whole = processor.encode(sample, images)
    fits = processor.encode(sample, images, max_length=len(whole.input_ids))
    np.testing.assert_array_equal(fits.input_ids, whole.input_ids)
    assert warnings == []
    limit = len(whole.input_ids) - 1
    cut = processor.encode(sample, images, max_length=limit)
    for name in ("input_ids", "labels", "pixel_values", "image_index"):
        np.testing.assert_array_equal(getattr(cut, name), getattr(short, name))
    assert warnings == [f"test.json record 0: the last 2 turns do not fit max_length {limit}"]


def test_only_the_first_truncations_are_told(processor: LlavaProcessor, warnings: list[str]) -> None:
    sample = make_sample("One?", "1", "Two?", "2")
    for _ in range(10):
        processor.encode(sample, [], processor.measure(sample, [])[0] - 1)
    assert [text.endswith("; further ones are not shown") for text in warnings] == [False, False, True]


@pytest.mark.parametrize("policy", ["truncate_turns", "skip", "error"])
def test_first_pair_that_is_too_long(processor: LlavaProcessor, policy: str) -> None:
    sample, images = make_sample("<image>\nOne?", "1", "Two?", "2"), [noise_picture(30, 40)]
    length = len(processor.encode(make_sample("<image>\nOne?", "1"), images).input_ids)
    expected = rf"^test.json record 0: .* have {length} tokens \(4 of them visual\), max_length is {length - 1}; raise"
    with pytest.raises(TooLongError, match=expected):
        processor.encode(sample, images, length - 1, policy)
    with pytest.raises(TooLongError, match=expected):
        processor.measure(sample, [(30, 40)], length - 1, policy)


@pytest.mark.parametrize("policy", ["skip", "error"])
def test_sample_that_is_not_to_be_truncated(processor: LlavaProcessor, policy: str) -> None:
    sample, images = make_sample("<image>\nOne?", "1", "Two?", "2"), [noise_picture(30, 40)]
    length = len(processor.encode(sample, images).input_ids)
    assert processor.measure(sample, [(30, 40)], length, policy) == (length, 4)
    expected = (
        rf"the conversation has {length} tokens \(4 of them visual\), max_length is {length - 1}; .*truncate_turns"
    )
    with pytest.raises(TooLongError, match=expected):
        processor.encode(sample, images, length - 1, policy)


def test_unknown_policy(processor: LlavaProcessor) -> None:
    with pytest.raises(UserError, match="on_too_long='skipp' is not one of .*did you mean 'skip'"):
        processor.measure(make_sample("Q", "A"), [], 9, "skipp")


def test_conversation_that_the_template_cannot_write_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="^test.json record 0: template 'plain' needs one image"):
        make_processor(tokenizer, template="plain").encode(make_sample("Q", "A"), [])


def test_nothing_supervised(processor: LlavaProcessor) -> None:
    silent = replace(processor, template=replace(get_template("plain"), end=""))
    messages = (Message(role="user", content=(0,)), Message(role="assistant", content=("",)))
    with pytest.raises(UserError, match="nothing to learn, every answer is empty"):
        silent.encode(replace(make_sample("<image>", "A"), messages=messages), [noise_picture(9, 9)])


@pytest.mark.parametrize("spec", [PAD_SPEC, ANYRES_SPEC, replace(PAD_SPEC, cls_token=True, aspect_mode="square")])
def test_settings_come_back_from_json(tokenizer: Tokenizer, tokenizer_directory: Path, spec: Any) -> None:
    processor = make_processor(tokenizer, spec, "llava_v1")
    values = json.loads(json.dumps(processor.to_dict()))
    again = processor_from_dict(values, tokenizer_directory)
    assert (again.image_spec, again.template) == (processor.image_spec, processor.template)


@pytest.mark.parametrize("key", ["chat_template", "image_aspect_ratio", "image_size", "patch_size", "image_mean"])
def test_missing_key_is_named(processor: LlavaProcessor, tmp_path: Path, key: str) -> None:
    values = {name: value for name, value in processor.to_dict().items() if name != key}
    with pytest.raises(UserError, match=rf"processor_config.json has no key '{key}'"):
        processor_from_dict(values, tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("chat_template", "vicuna", "conversation template 'vicuna' is not one of"),
        ("image_aspect_ratio", "anyres_max_9", "image_aspect_ratio='anyres_max_9' is not one of"),
        ("image_size", "large", "'image_size': 'large'.*invalid literal"),
        ("image_mean", 0.5, "'image_mean': 0.5.*not iterable"),
        ("image_grid_pinpoints", [336, 672], r"'image_grid_pinpoints': \[336, 672\]"),
        ("resample", 0, "resample 0 is not one of 1, 2, 3"),
        ("size", {"shortest_edge": 14}, "size 14 is smaller than the "),
    ],
)
def test_value_that_is_not_allowed(
    processor: LlavaProcessor, tokenizer_directory: Path, key: str, value: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        processor_from_dict({**processor.to_dict(), key: value}, tokenizer_directory)


def test_folder_without_tokenizer(processor: LlavaProcessor, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no tokenizer in"):
        processor_from_dict(processor.to_dict(), tmp_path)


def test_image_spec_tells_its_missing_keys() -> None:
    with pytest.raises(KeyError, match="image_size"):
        image_spec_from_dict({})
