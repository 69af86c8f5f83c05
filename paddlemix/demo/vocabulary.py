"""A small tokenizer of the Llama kind, trained on the demo's own texts.

Writes the files that a Llama checkpoint has, so that the demo's model loads through the same code as a real one.  Knows
texts only: no model, no image.  Source of the settings: the trainer and normaliser records inside Llama's
tokenizer.model; only the size, and keeping every character, are our own.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from paddlemix.demo.results import write_result
from paddlemix.errors import MissingFileError, UserError
from paddlemix.sample import IMAGE_TOKEN

VOCAB_SIZE = 640  # at most, with 3 special and 256 byte pieces; a small output layer is a fast one
MODEL_MAX_LENGTH = 512


def corpus(files: Iterable[Path]) -> Iterator[str]:
    """The texts that a model of the demo reads, in order.

    Args:
        files: JSON lists of records with `conversations` as [question, answer] pairs.

    Yields:
        "[INST] question [/INST] answer" for each turn, as the template `mistral_instruct` writes it; without `<image>`
        and line ends, which are not words.

    Raises:
        MissingFileError: a list does not exist.
    """
    for path in files:
        if not path.is_file():
            raise MissingFileError(f"there is no list {path} to read texts from; make the demo data first")
        for record in json.loads(path.read_text(encoding="utf-8")):
            for question, answer in record["conversations"]:
                yield f"[INST] {question.replace(IMAGE_TOKEN, '').strip()} [/INST] {answer}"


def train_tokenizer(texts: Iterable[str], directory: Path, vocab_size: int = VOCAB_SIZE) -> int:
    """Train a SentencePiece BPE model and write it in the form of a Llama checkpoint.

    Ids 0 to 2 are `<unk>`, `<s>`, `</s>`, 3 to 258 the bytes; a character that no text has is written in bytes, and so
    is the line end.

    Args:
        texts: lines of text; the same lines give the same bytes.
        directory: made if missing; gets tokenizer.model, tokenizer_config.json and special_tokens_map.json.
        vocab_size: pieces wanted, above 259 and the number of different characters; fewer come out when the texts have
            no more pairs to join.

    Returns:
        The number of pieces.

    Raises:
        UserError: no texts, `vocab_size` too small for them, sentencepiece is missing, or the directory cannot be
            written.
    """
    lines = [line for text in texts for line in text.splitlines() if line]
    # 3 special pieces and 256 bytes.
    smallest = 259 + len({character for line in lines for character in line}) + 1  # and the space mark
    if not lines:
        raise UserError("there are no texts to train a tokenizer on; give at least one line")
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size={vocab_size} is too small: 3 special pieces, 256 bytes and the characters of the texts "
            f"need {smallest}; the default is {VOCAB_SIZE}"
        )
    model = _train(lines, vocab_size)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # written beside it and renamed: a tokenizer that exists is whole
        partial = directory / "tokenizer.model.partial"
        partial.write_bytes(model)
        os.replace(partial, directory / "tokenizer.model")
    except OSError as error:
        raise UserError(f"cannot write in {directory}: {error}; name a directory that you can write") from error
    write_result(directory / "tokenizer_config.json", _tokenizer_config())
    write_result(directory / "special_tokens_map.json", _special_tokens())

    import sentencepiece

    return int(sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size())


def _train(lines: list[str], vocab_size: int) -> bytes:
    """The serialised model; written to memory, so that no path becomes part of its bytes."""
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError("sentencepiece is not installed; run: pip install sentencepiece") from error
    model = io.BytesIO()
    # The same texts give the same bytes.
    sentencepiece.set_random_generator_seed(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        # fewer pieces than wanted are no error: the texts have few words
        hard_vocab_limit=False,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        # no piece of its own: padding is <unk>, as LLaVA has it
        pad_id=-1,
        # Llama's settings: unknown characters become bytes, digits stand alone.
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        # with several threads the pieces could depend on their order
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _special_tokens() -> dict[str, object]:
    """special_tokens_map.json; padding is `<unk>`, as LLaVA has it."""
    tokens: dict[str, object] = {
        name: {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        for name, content in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
    }
    return {**tokens, "pad_token": "<unk>"}


def _tokenizer_config() -> dict[str, object]:
    """tokenizer_config.json."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(index): {"content": content, **flags} for index, content in enumerate(("<unk>", "<s>", "</s>"))
        },
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": False,
        "model_max_length": MODEL_MAX_LENGTH,
        "pad_token": "<unk>",
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
