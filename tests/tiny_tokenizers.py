"""Tiny vocabularies of every kind that a shipped family has, trained on a few lines, as that family's files.

Each builder writes into an empty folder what a checkpoint of the family holds; ids and settings that matter are those
of the published files (named at each builder).  Knows no model.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from paddlemix.demo.vocabulary import train_tokenizer

TEXTS = (
    "A chat between a curious user and an artificial intelligence assistant.",
    "USER: What is the colour of the big bus? ASSISTANT: It is red. user assistant system",
    "Where is the small cat? On the mat, 0.25, 0.33. How many? 1, 2, 3 or 45",
    "你好，这是什么颜色？红色的公交车。 <|User|>: <|Bot|>:",
    "def f(x):\n    return x >= 1 and x <= 20  # it's\n",
)
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = QWEN_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3_SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "<|reserved_special_token_0|>",
)


def llama(directory: Path) -> None:
    """Vicuna: SentencePiece under the newer prefix rule.  Source: lmsys/vicuna-7b-v1.5."""
    train_tokenizer([line for line in TEXTS for _ in range(4)], directory, vocab_size=480)


def mistral(directory: Path) -> None:
    """SentencePiece under the older prefix rule.  Source: mistralai/Mistral-7B-Instruct-v0.2."""
    _write_sentencepiece(directory, _train_sentencepiece(), {"legacy": True, "add_bos_token": True})


def yi(directory: Path) -> None:
    """No BOS, no space before a text, and ChatML's tokens inside the model.  Source: 01-ai/Yi-34B."""
    model = _train_sentencepiece(add_dummy_prefix=False, user_defined_symbols=["<|im_start|>", "<|im_end|>"])
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<unk>"}
    _write_sentencepiece(directory, model, {"legacy": True, "add_bos_token": False, **tokens})


def yi_json(directory: Path) -> None:
    """The same as `tokenizer.json`, as transformers makes it of the model, and without the model."""
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import LlamaConverter

    yi(directory)
    slow = LlamaTokenizer.from_pretrained(str(directory))
    LlamaConverter(slow).converted().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer.model").unlink()
    _change_config(directory, tokenizer_class="PreTrainedTokenizerFast")


def mistral_json(directory: Path) -> None:
    """A SentencePiece vocabulary with a space before every text, as `tokenizer.json` alone."""
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import LlamaConverter

    mistral(directory)
    slow = LlamaTokenizer.from_pretrained(str(directory))
    LlamaConverter(slow).converted().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer.model").unlink()
    _change_config(directory, tokenizer_class="LlamaTokenizer")


def internlm(directory: Path) -> None:
    """SentencePiece with `<eoh>` and `<eoa>` inside the model, a class that comes as code, and no word on the prefix
    rule.  Source: internlm/internlm-chat-7b."""
    model = _train_sentencepiece(user_defined_symbols=["<eoh>", "<eoa>"])
    code = {"auto_map": {"AutoTokenizer": ["tokenization_internlm.InternLMTokenizer", None]}}
    _write_sentencepiece(directory, model, {"tokenizer_class": "InternLMTokenizer", **code})
    (directory / "tokenization_internlm.py").write_text("raise RuntimeError('code of a checkpoint was run')\n")


def internlm2(directory: Path) -> None:
    """The same with ChatML's tokens, which stand in places that the model keeps free.
    Source: internlm/internlm2-chat-7b."""
    model = _train_sentencepiece(user_defined_symbols=["[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"])
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    declared = {"3": {"content": "<|im_start|>", **flags}, "4": {"content": "<|im_end|>", **flags}}
    values = {
        "tokenizer_class": "InternLM2Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "added_tokens_decoder": declared,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    }
    _write_sentencepiece(directory, model, values)
    (directory / "tokenization_internlm2.py").write_text("raise RuntimeError('code of a checkpoint was run')\n")


def llama3(directory: Path) -> None:
    """Byte-level `tokenizer.json` whose post-processor adds BOS.  Source: meta-llama/Meta-Llama-3-8B-Instruct."""
    from tokenizers import processors

    fast = _train_byte_level(LLAMA3_PATTERN, LLAMA3_SPECIAL, ignore_merges=True)
    begin = ("<|begin_of_text|>", fast.token_to_id("<|begin_of_text|>"))
    fast.post_processor = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[begin])
    fast.save(str(directory / "tokenizer.json"))
    _write_config(
        directory,
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
    )


def qwen(directory: Path) -> None:
    """Byte-level `vocab.json` and `merges.txt`, no BOS, special tokens declared.  Source: Qwen/Qwen1.5-7B-Chat."""
    fast = _train_byte_level(QWEN_PATTERN, (), normalise=True)
    fast.model.save(str(directory))
    count = fast.get_vocab_size()
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    _write_config(
        directory,
        tokenizer_class="Qwen2Tokenizer",
        added_tokens_decoder={str(count + n): {"content": token, **flags} for n, token in enumerate(QWEN_SPECIAL)},
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
    )


def qwen_tiktoken(directory: Path) -> None:
    """`qwen.tiktoken` alone, its class as code.  Source: Qwen/Qwen-7B-Chat."""
    lines = (f"{base64.b64encode(token).decode()} {rank}" for token, rank in tiktoken_ranks().items())
    (directory / "qwen.tiktoken").write_text("\n".join(lines) + "\n")
    code = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    _write_config(directory, tokenizer_class="QWenTokenizer", auto_map=code)


BUILDERS: dict[str, Callable[[Path], None]] = {
    "llama": llama,
    "mistral": mistral,
    "mistral_json": mistral_json,
    "yi": yi,
    "yi_json": yi_json,
    "internlm": internlm,
    "internlm2": internlm2,
    "llama3": llama3,
    "qwen": qwen,
    "qwen_tiktoken": qwen_tiktoken,
}


def tiktoken_ranks() -> dict[bytes, int]:
    """Byte strings and their ranks: all bytes, then what joins of the trained vocabulary spell."""
    fast = _train_byte_level(QWEN_PATTERN, ())
    letters = {letter: byte for byte, letter in _letters().items()}
    pieces = sorted(fast.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes(letters[letter] for letter in piece) for piece, _ in pieces]
    return {token: rank for rank, token in enumerate(tokens)}


def _letters() -> dict[int, str]:
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

    return bytes_to_unicode()


def _train_sentencepiece(**changes: Any) -> bytes:
    """A BPE model with byte fallback; ids 0 to 2 are `<unk>`, `<s>`, `</s>`, then those of `user_defined_symbols`."""
    import sentencepiece

    model = io.BytesIO()
    values: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 480,
        "hard_vocab_limit": False,
        "character_coverage": 1.0,
        "pad_id": -1,
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    lines: Iterable[str] = (line for text in TEXTS for _ in range(4) for line in text.splitlines())
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **{**values, **changes})
    return model.getvalue()


def _write_sentencepiece(directory: Path, model: bytes, values: dict[str, Any]) -> None:
    (directory / "tokenizer.model").write_bytes(model)
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    _write_config(directory, **{"tokenizer_class": "LlamaTokenizer", **roles, **values})


def _train_byte_level(
    pattern: str, special: tuple[str, ...], normalise: bool = False, ignore_merges: bool = False
) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    fast = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalise:
        fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
    )
    fast.train_from_iterator([text for text in TEXTS for _ in range(4)], trainer)
    return fast


def _write_config(directory: Path, **values: Any) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps(values, ensure_ascii=False))


def _change_config(directory: Path, **changes: Any) -> None:
    values = json.loads((directory / "tokenizer_config.json").read_text())
    _write_config(directory, **{**values, **changes})
