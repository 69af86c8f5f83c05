"""Piecewise token ids equal the reference tokenizer's on the whole text; nothing in a text is a special token."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from paddlemix.errors import MissingFileError, UserError
from paddlemix.processors.text.tokenizer import Tokenizer, load_tokenizer
from tests.golden_conversations import LLAMA, VOCABULARIES

# Any text without the special tokens' own spelling, which the reference would parse.
TEXT = st.text(max_size=40).filter(lambda text: not any(token in text for token in ("<s>", "</s>", "<unk>")))


@pytest.fixture(scope="session", params=[False, True], ids=["non-legacy", "legacy"])
def reference(request: pytest.FixtureRequest, tokenizer_directory: Path) -> Any:
    from transformers import LlamaTokenizer

    return LlamaTokenizer.from_pretrained(str(tokenizer_directory), legacy=request.param)


@given(text=TEXT)
@example(text="")
@example(text=" ")
@example(text="  two spaces  ")
@example(text="\n\nlines\n")
@example(text="▁mark")
def test_encode_at_start_equals_reference(reference: Any, text: str) -> None:
    assert Tokenizer(reference).encode(text) == reference.encode(text, add_special_tokens=False)


@given(text=TEXT.filter(bool))
def test_encode_after_special_equals_reference(reference: Any, text: str) -> None:
    whole = reference.encode(f"is</s>{text}", add_special_tokens=False)
    end = whole.index(reference.eos_token_id) + 1
    assert Tokenizer(reference).encode(text, "special") == whole[end:]


@given(text=TEXT)
@example(text="cat")
def test_encode_of_a_new_word_after_text_equals_reference(reference: Any, text: str) -> None:
    ours = Tokenizer(reference)
    joined = reference.encode(f"ASSISTANT: {text}", add_special_tokens=False)
    assert ours.encode("ASSISTANT:") + ours.encode(f" {text}", "text") == joined


@pytest.mark.parametrize("text", ["=3", ">", "> x", "<s>", "cat", "\nline", "。"])
def test_continued_text_is_not_changed_by_what_it_is_measured_with(reference: Any, text: str) -> None:
    ours = Tokenizer(reference)
    pieces = reference.convert_ids_to_tokens(ours.encode(text, "text"))
    spelled = b"".join(bytes([int(piece[3:5], 16)]) if piece.startswith("<0x") else piece.encode() for piece in pieces)
    assert spelled.decode() == text.replace(" ", "▁")


@pytest.mark.parametrize("vocabulary", VOCABULARIES, ids=lambda path: path.parent.name)
def test_ids_in_every_place(vocabulary: Path) -> None:
    """ "USER:" at a start, after </s> where no word begins, a word after text, and a text after an image."""
    llama = load_tokenizer(vocabulary)
    found = [llama.encode("USER:"), llama.encode("USER:", "special"), llama.encode(" yes", "text")]
    found += [llama.encode("\nWhat"), [llama.bos_token_id, llama.eos_token_id, llama.pad_token_id, len(llama)]]
    if vocabulary == LLAMA:
        assert found == [[3148, 1001, 29901], [11889, 29901], [4874], [29871, 13, 5618], [1, 2, 0, 32000]]
    else:
        assert found == [[260, 261, 427], [272, 427], [266, 300], [409, 13, 451, 311], [1, 2, 0, 480]]


@given(text=TEXT)
def test_decode_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


def test_decode_leaves_special_tokens_out_unless_told(tokenizer: Tokenizer) -> None:
    ids = [1, *tokenizer.encode("a cat"), 2]
    assert tokenizer.decode(ids) == "a cat"
    assert tokenizer.decode([1, 2]) == tokenizer.decode([]) == ""
    assert tokenizer.decode(ids, skip_special_tokens=False).replace(" ", "") == "<s>acat</s>"


def test_ids_of_a_padded_vocabulary_leave_no_trace(tokenizer: Tokenizer) -> None:
    """A model may have more rows than its tokenizer has ids, and say one of them."""
    ids = tokenizer.encode("a cat")
    assert tokenizer.decode([*ids, len(tokenizer), len(tokenizer) + 63]) == "a cat"
    assert tokenizer.decode([len(tokenizer)], skip_special_tokens=False) == ""


def test_special_tokens_in_text_are_characters(tokenizer: Tokenizer) -> None:
    for text in ("</s>", "<s>", "<unk>", "a </s> b<s>"):
        ids = tokenizer.encode(text)
        assert not {0, 1, 2} & set(ids)
        assert tokenizer.decode(ids) == text


def test_special_id(tokenizer: Tokenizer) -> None:
    assert [tokenizer.special_id(token) for token in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
    assert tokenizer.special_id("<|im_end|>") is None


def test_padding_is_declared_or_unknown_or_end(tokenizer_directory: Path) -> None:
    from transformers import LlamaTokenizer

    plain = LlamaTokenizer.from_pretrained(str(tokenizer_directory))
    assert Tokenizer(plain).pad_token_id == 0
    plain.pad_token = None
    assert Tokenizer(plain).pad_token_id == 0
    plain.pad_token = "</s>"
    assert Tokenizer(plain).pad_token_id == 2
    plain.eos_token = None
    with pytest.raises(UserError, match="names no eos_token"):
        Tokenizer(plain)


def test_save_copies_the_files(tokenizer: Tokenizer, tokenizer_directory: Path, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["special_tokens_map.json", "tokenizer.model", "tokenizer_config.json"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (tokenizer_directory / name).read_bytes()
    assert load_tokenizer(tmp_path).encode("the cat") == tokenizer.encode("the cat")


def test_model_file_alone_is_enough(tokenizer: Tokenizer, tokenizer_directory: Path, tmp_path: Path) -> None:
    shutil.copy(tokenizer_directory / "tokenizer.model", tmp_path)
    alone = load_tokenizer(tmp_path)
    assert (alone.bos_token_id, alone.eos_token_id, alone.pad_token_id) == (1, 2, 0)
    assert alone.encode("a cat") + alone.encode("USER", "special") == tokenizer.encode("a cat") + tokenizer.encode(
        "USER", "special"
    )


@pytest.mark.parametrize("adds_bos", [True, False])
def test_fast_tokenizer(tmp_path: Path, adds_bos: bool) -> None:
    """A byte-level tokenizer.json, as Llama 3 has it: BOS is added by its post-processor, without any flag."""
    write_fast_tokenizer(tmp_path, adds_bos)
    fast = load_tokenizer(tmp_path)
    assert fast.bos_token_id == (fast.special_id("<|begin|>") if adds_bos else None)
    text = "the cat<|end|> 你好\n"
    ids = fast.encode(text)
    assert fast.special_id("<|end|>") not in ids  # text, not a token
    assert fast.decode(ids) == text
    copy = tmp_path / "copy"
    copy.mkdir()
    fast.save(copy)
    assert (copy / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def write_fast_tokenizer(directory: Path, adds_bos: bool) -> None:
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|begin|>", "<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(["the cat is on the mat"] * 3, trainer)
    if adds_bos:
        fast.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<|begin|>", eos_token="<|end|>").save_pretrained(
        str(directory)
    )


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"expected tokenizer.model or tokenizer.json; copy them"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_damaged_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not a tokenizer")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_a_byte_order_mark_is_refused_in_words(tokenizer_directory: Path, tmp_path: Path) -> None:
    """Transformers cannot read such a file, and says so in words that do not name it."""
    folder = shutil.copytree(tokenizer_directory, tmp_path / "model")
    content = (folder / "tokenizer_config.json").read_bytes()
    (folder / "tokenizer_config.json").write_bytes(b"\xef\xbb\xbf" + content)
    with pytest.raises(UserError, match=r"tokenizer_config.json' begins with a byte order mark; save it as UTF-8"):
        load_tokenizer(folder)
