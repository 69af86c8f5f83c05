"""Added vocabulary in a text: ids of the reference's tokenizer, for every kind of file; markers stay characters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken

from paddlemix.processors.text.tokenizer import Tokenizer, load_tokenizer
from tests import tiny_tokenizers
from tests.tiny import make_processor, make_sample

ADDED = (
    AddedToken("[SEG]", special=False),  # as `tokenizer.add_tokens("[SEG]")`
    AddedToken("<loc>", special=True, normalized=False),
    AddedToken("<box>", special=True, normalized=False),
    AddedToken("[L]", special=False, lstrip=True, normalized=False),
    AddedToken("[R]", special=False, rstrip=True, normalized=False),
)
# Any mixture of added tokens and words around them, without the spelling of special tokens.
TEXT = st.lists(
    st.sampled_from(
        [*(token.content for token in ADDED), " ", "  ", "\n", ".", "Sure", "the cat", "is", "好", "=", "1"]
    ),
    min_size=1,
    max_size=8,
).map("".join)


def fast_llama(directory: Path, legacy: bool) -> None:
    """A Llama's `tokenizer.json`, as transformers makes it of the SentencePiece model under either prefix rule."""
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import LlamaConverter

    tiny_tokenizers.llama(directory)
    slow = LlamaTokenizer.from_pretrained(str(directory), legacy=legacy)
    LlamaConverter(slow).converted().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer.model").unlink()
    tiny_tokenizers._change_config(directory, tokenizer_class="PreTrainedTokenizerFast", legacy=legacy)


KINDS: dict[str, Callable[[Path], None]] = {
    **{name: tiny_tokenizers.BUILDERS[name] for name in ("llama", "mistral", "yi", "yi_json", "llama3", "qwen")},
    "llama_json": lambda directory: fast_llama(directory, legacy=False),
    "llama_json_legacy": lambda directory: fast_llama(directory, legacy=True),
}


@pytest.fixture(scope="module", params=sorted(KINDS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """Ours, read back from the files that the reference saves, and the reference, which has the added tokens."""
    plain, saved = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("saved")
    KINDS[request.param](plain)
    reference = load_tokenizer(plain)._hf
    reference.add_tokens([token for token in ADDED if not token.special])
    reference.add_special_tokens({"additional_special_tokens": [ADDED[1]]}, replace_additional_special_tokens=False)
    reference.add_tokens([ADDED[2]], special_tokens=True)  # special, but in no list of the tokenizer
    reference.save_pretrained(str(saved))
    return load_tokenizer(saved), reference


@given(text=TEXT)
@example(text="Sure, [SEG].")
@example(text="[SEG]")
@example(text="<loc> is")
@example(text="<box>is")
@example(text=" [L] the cat [R] is [SEG][SEG]")
def test_a_text_that_begins(pair: tuple[Tokenizer, Any], text: str) -> None:
    ours, reference = pair
    assert ours.encode(text) == reference.encode(text, add_special_tokens=False)


@given(text=TEXT.filter(lambda text: not text.isspace()))
@example(text="Sure, [SEG].")
@example(text="Sure[SEG]")
def test_a_text_that_continues(pair: tuple[Tokenizer, Any], text: str) -> None:
    ours, reference = pair
    start = ours.encode("ASSISTANT:")
    joined = reference.encode(f"ASSISTANT: {text}", add_special_tokens=False)
    assert start + ours.encode(f" {text}", "text") == joined


@given(text=TEXT.filter(lambda text: not text.isspace()))
def test_a_text_after_a_special_token(pair: tuple[Tokenizer, Any], text: str) -> None:
    ours, reference = pair
    whole = reference.encode(f"is{reference.eos_token}{text}", add_special_tokens=False)
    place = whole.index(reference.eos_token_id) + 1
    assert ours.encode(text, "special") == whole[place:]


def test_the_added_row_is_trained_and_decoded(pair: tuple[Tokenizer, Any]) -> None:
    """A sample whose answer holds the token: its row is a target, and the text comes back."""
    ours, reference = pair
    row = reference.convert_tokens_to_ids("[SEG]")
    encoded = make_processor(ours).encode_text(make_sample("What is it?", "Sure, [SEG].").messages, [])
    assert row in encoded.labels.tolist() and (encoded.labels == row).sum() == 1
    assert np.array_equal(encoded.input_ids[encoded.labels == row], [row])
    assert ours.decode([row]) == "[SEG]"


@pytest.mark.parametrize("text", ["</s>", "a <s> b", "<unk>", "<image>", "<|im_end|> x", "<|eot_id|>"])
def test_markers_and_roles_stay_characters(pair: tuple[Tokenizer, Any], text: str) -> None:
    ours, reference = pair
    roles = {reference.bos_token_id, reference.eos_token_id, reference.pad_token_id} - {None, reference.unk_token_id}
    ids = ours.encode(text)
    assert not roles & set(ids)
    assert ours.decode(ids).strip() == text
