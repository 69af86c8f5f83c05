"""Ids of every kind of vocabulary equal the reference library's, whole texts and pieces; streamed text is the text.

The reference is transformers' own class where there is one, tiktoken for `qwen.tiktoken`, and for InternLM, whose class
is code of its checkpoints, its rule written down here: SentencePiece over each stretch between special tokens.
"""

from __future__ import annotations

import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddlemix.errors import UserError
from paddlemix.generation.ending import Ending, GrowingText
from paddlemix.processors.text.conversation import prompt_text, render_rounds
from paddlemix.processors.text.encoding import encode_pairs
from paddlemix.processors.text.known_templates import get_template
from paddlemix.processors.text.template import SPECIAL_TOKENS
from paddlemix.processors.text.text_encoders import Neighbour
from paddlemix.processors.text.tokenizer import Tokenizer, load_tokenizer
from paddlemix.sample import Message
from tests.tiny_tokenizers import BUILDERS, QWEN_PATTERN, QWEN_SPECIAL, tiktoken_ranks

Reference = Callable[[str], list[int]]
TEXTS = [
    "What is this?",
    " a word",
    "  two spaces  and more   ",
    "\n",
    "\n\nlines\n\n  indented\n",
    "这是什么颜色？红色的公交车。",
    "🚌 bus 👩‍👩‍👧 e\u0301 é ﬁ",
    "def f(x):\n\treturn {x: [1, 22, 333]} if x >= 10 else 'it''s'\n",
    "</ <| |> <s <unk",
    "0.25, 1234567 ½ x²",
    "\u200b\u00a0nbsp",
]
SPECIAL = {  # one that each kind knows
    "llama": "</s>",
    "mistral": "</s>",
    "mistral_json": "</s>",
    "yi": "<|im_end|>",
    "yi_json": "<|im_end|>",
    "internlm": "<eoa>",
    "internlm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "qwen": "<|im_end|>",
    "qwen_tiktoken": "<|im_end|>",
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, build in BUILDERS.items():
        made[name] = tmp_path_factory.mktemp(name)
        build(made[name])
    return made


@pytest.fixture(scope="module", params=BUILDERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def ours(kind: str, directories: dict[str, Path]) -> Tokenizer:
    return load_tokenizer(directories[kind])


@pytest.fixture(scope="module")
def reference(kind: str, directories: dict[str, Path]) -> Reference:
    """Ids of a whole text, special tokens in it recognised, without BOS."""
    return make_reference(kind, directories[kind])


def make_reference(kind: str, directory: Path) -> Reference:
    if kind in ("internlm", "internlm2"):
        return internlm_rule(kind, directory)
    if kind == "qwen_tiktoken":
        return tiktoken_ids()
    from transformers import AutoTokenizer, LlamaTokenizer, LlamaTokenizerFast, Qwen2Tokenizer

    read: Any = {"qwen": Qwen2Tokenizer, "mistral_json": LlamaTokenizerFast}.get(kind)
    if read is None:
        read = LlamaTokenizer if (directory / "tokenizer.model").is_file() else AutoTokenizer
    theirs = read.from_pretrained(str(directory))
    return lambda text: theirs.encode(text, add_special_tokens=False)


def internlm_rule(kind: str, directory: Path) -> Reference:
    """Source: internlm/internlm-chat-7b tokenization_internlm.py and internlm2-chat-7b tokenization_internlm2.py."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    known = {"<s>": 1, "</s>": 2, "<unk>": 0}
    known |= {"<|im_start|>": 3, "<|im_end|>": 4} if kind == "internlm2" else {}
    pattern = re.compile("(" + "|".join(map(re.escape, known)) + ")")

    def encode(text: str) -> list[int]:
        parts = [part for part in pattern.split(text) if part]
        return [index for part in parts for index in ([known[part]] if part in known else model.encode(part))]

    return encode


def tiktoken_ids() -> Reference:
    import unicodedata

    import tiktoken

    ranks = tiktoken_ranks()
    special = {token: len(ranks) + number for number, token in enumerate(QWEN_SPECIAL)}
    theirs = tiktoken.Encoding("tiny", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return lambda text: theirs.encode(unicodedata.normalize("NFC", text), allowed_special="all")


def without_special(text: str) -> str:
    """The text without anything that a vocabulary above has as a special token."""
    for token in (*SPECIAL_TOKENS, "<unk>", "[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"):
        text = text.replace(token, "")
    return text.replace("▁", "")


ANY = st.one_of(st.text(max_size=24), st.lists(st.sampled_from(TEXTS), max_size=3).map("".join)).map(without_special)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_has_the_reference_s_ids(ours: Tokenizer, reference: Reference, text: str) -> None:
    assert ours.encode(text) == reference(text)


@settings(max_examples=25)
@given(text=ANY)
def test_any_text_has_the_reference_s_ids(ours: Tokenizer, reference: Reference, text: str) -> None:
    assert ours.encode(text) == reference(text)


@settings(max_examples=25)
@given(before=ANY.filter(bool), behind=ANY.filter(bool))
def test_pieces_around_a_special_token(
    kind: str, ours: Tokenizer, reference: Reference, before: str, behind: str
) -> None:
    token = SPECIAL[kind]
    index = ours.special_id(token)
    assert index is not None
    assert ours.after_special(token) == ("text" if kind == "internlm" else "special")  # a piece of the model
    pieces = [*ours.encode(before), index, *ours.encode(behind, ours.after_special(token))]
    assert pieces == reference(before + token + behind)


@pytest.mark.parametrize("answer", ["yes", "It is red.", "你好", "🚌", "1.5", "def f():"])
def test_an_answer_continues_its_prompt(ours: Tokenizer, reference: Reference, answer: str) -> None:
    """A new word: every vocabulary begins a piece there, so the pieces are those of the whole."""
    assert ours.encode("ASSISTANT:") + ours.encode(f" {answer}", "text") == reference(f"ASSISTANT: {answer}")
    assert ours.encode("assistant\n") + ours.encode(answer, "text") == reference(f"assistant\n{answer}")


@settings(max_examples=25)
@given(text=st.lists(st.sampled_from([*SPECIAL_TOKENS, "<unk>", " ", "a", "是"]), min_size=1, max_size=4).map("".join))
@pytest.mark.parametrize("after", ["start", "special", "text"])
def test_no_text_holds_a_special_token(ours: Tokenizer, after: Neighbour, text: str) -> None:
    special = {ours.special_id(token) for token in (*SPECIAL_TOKENS, "<unk>")} - {None}
    ids = ours.encode(text, after)
    assert not special & set(ids)
    assert ours.decode(ids).strip() == text.strip()


@settings(max_examples=25)
@given(text=ANY)
def test_decoding_gives_the_text_back(kind: str, ours: Tokenizer, text: str) -> None:
    if kind.startswith("qwen"):
        import unicodedata

        text = unicodedata.normalize("NFC", text)
    assert ours.decode(ours.encode(text)).lstrip(" ") == text.lstrip(" ")


@settings(max_examples=25)
@given(text=ANY)
def test_streamed_text_is_the_text(ours: Tokenizer, text: str) -> None:
    ids = ours.encode(text)
    growing = GrowingText(ours, Ending(frozenset(), ("<|User|>",)))
    shown = ""
    for index in ids:
        shown += growing.add(index)
        assert ours.decode(ids).lstrip().startswith(shown)
    assert shown + growing.rest() == ours.decode(ids).lstrip()


def test_a_character_in_bytes_is_shown_when_it_is_whole(ours: Tokenizer) -> None:
    ids = ours.encode("x 🚌", "text")
    growing = GrowingText(ours, Ending(frozenset(), ()))
    pieces = [growing.add(index) for index in ids]
    assert len(ids) >= 5 and pieces[-1] == "🚌" and "\ufffd" not in "".join(pieces)


def test_bos_is_what_the_family_has(kind: str, ours: Tokenizer) -> None:
    bos = {"yi": None, "yi_json": None, "llama3": "<|begin_of_text|>", "qwen": None, "qwen_tiktoken": None}
    token = bos.get(kind, "<s>")
    assert ours.bos_token_id == (None if token is None else ours.special_id(token))
    assert ours.eos_token_id is not None and ours.pad_token_id is not None


def test_a_worker_process_gets_the_same(ours: Tokenizer) -> None:
    text = "a " + " b".join(SPECIAL_TOKENS)
    again = pickle.loads(pickle.dumps(ours))
    for after in ("start", "special", "text"):
        assert again.encode(text, after) == ours.encode(text, after)


def test_files_travel(kind: str, ours: Tokenizer, directories: dict[str, Path], tmp_path: Path) -> None:
    ours.save(tmp_path)
    assert not list(tmp_path.glob("*.py"))  # code of a checkpoint stays behind
    again = load_tokenizer(tmp_path)
    text = "".join(TEXTS)
    assert again.encode(text) == ours.encode(text) and again.fingerprint == ours.fingerprint
    assert len(again) == len(ours)


def test_a_piece_that_is_spelled_like_a_special_token_is_none(directories: dict[str, Path], tmp_path: Path) -> None:
    """Byte-level vocabularies are large enough to have `</s>` among their ordinary pieces."""
    shutil.copytree(directories["llama3"], tmp_path / "copy")
    path = tmp_path / "copy" / "tokenizer.json"
    assert load_tokenizer(path.parent).special_id("</s>") is None
    text = path.read_text()
    path.write_text(text.replace('"vocab":{', '"vocab":{"</s>":999,').replace('"vocab": {', '"vocab": {"</s>": 999,'))
    assert path.read_text() != text
    assert load_tokenizer(path.parent).special_id("</s>") is None


def test_vocabulary_without_its_class(directories: dict[str, Path], tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(directories["qwen"] / name, tmp_path)
    with pytest.raises(UserError, match=r"does not say how text is cut into words; add .*Qwen2Tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("YQ== 0\nYg==\n", "line 2 is not 'base64 rank'"), ("YQ== 0\nYg== 3\n", "ranks are not 0 to 1")],
)
def test_damaged_tiktoken_file(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "qwen.tiktoken").write_text(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_llama_3_s_own_file_beside_tokenizer_json(directories: dict[str, Path], tmp_path: Path) -> None:
    """Meta's download has a `tokenizer.model` that is no SentencePiece model."""
    shutil.copytree(directories["llama3"], tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    assert load_tokenizer(tmp_path / "copy").encode("a bus") == load_tokenizer(directories["llama3"]).encode("a bus")


TEMPLATES_OF = {
    "llama": "vicuna_v1",
    "mistral": "mistral_instruct",
    "mistral_json": "mistral_instruct",
    "yi": "chatml_direct",
    "yi_json": "chatml_direct",
    "internlm": "xtuner_internlm_chat",
    "internlm2": "xtuner_internlm2_chat",
    "llama3": "llava_llama_3",
    "qwen": "qwen_1_5",
    "qwen_tiktoken": "qwen_1_5",
}


def test_a_conversation_has_the_ids_of_its_text(kind: str, ours: Tokenizer, reference: Reference) -> None:
    """Two rounds, rendered and encoded piece by piece, against the reference on the whole prompt."""
    turns = ("What is this?", "A bus. 🚌", "def f(x):\n    return 红色", "It's 0.25.")
    roles = ("user", "assistant")
    messages = [Message(role=roles[number % 2], content=(text,)) for number, text in enumerate(turns)]
    rounds = render_rounds(get_template(TEMPLATES_OF[kind]), messages)
    ids = [index for pair in encode_pairs(rounds, ours, lambda image: 0) for index in pair.ids]
    text = prompt_text([piece for pieces in rounds for piece in pieces])
    begin = [] if ours.bos_token_id is None else [ours.bos_token_id]
    assert ids == begin + reference(text)
