"""A checkpoint between two layouts: opened, every weight checked, under our names and without llava-hf's added rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paddlemix.checkpoints.convert import declared_files
from paddlemix.checkpoints.files.tensors import FLOAT_TYPES, TensorEntry, converted
from paddlemix.checkpoints.files.weight_files import read_json
from paddlemix.checkpoints.hub.resolve import resolve_model
from paddlemix.checkpoints.layouts.added_rows import HfVocabulary, read_carried_vocabulary, split_added_rows
from paddlemix.checkpoints.layouts.families import FAMILIES
from paddlemix.checkpoints.layouts.file_names import CONFIG_FILE
from paddlemix.checkpoints.quantized import read_quantization
from paddlemix.checkpoints.source import open_source
from paddlemix.checkpoints.weight_check import check_vocabulary, check_weights
from paddlemix.declared import without_null
from paddlemix.errors import UserError
from paddlemix.models.configuration import DecoderConfig
from paddlemix.models.presets import parameter_shapes
from paddlemix.processors.text.tokenizer import has_tokenizer, load_tokenizer

_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint between two layouts: complete, under our names, unread.

    Args:
        directory: where it comes from.
        facts: what its files declare.
        tensors: every weight, without rows that llava-hf added.
        added: those rows, if the source is llava-hf or once was.
    """

    directory: Path
    facts: declared_files.Facts
    tensors: dict[str, TensorEntry]
    added: HfVocabulary | None


def read_checkpoint(directory: Path, dtype: str | None = None) -> Checkpoint:
    """Opens a model directory of any layout and checks every weight's name and shape.

    Args:
        dtype: to convert floating-point weights to.

    Raises:
        MissingFileError, UserError: it cannot be used, see `export_model.convert_checkpoint`.
    """
    # codes have no place in any other layout, and decoding them here would pass rounded weights off as the model
    directory = resolve_model(directory)
    if read_quantization(directory) is not None:
        raise UserError(f"{directory} is quantised; convert the model that it was made from")
    source = open_source(directory)
    tensors, config = source.tensors(), source.config
    check_weights(parameter_shapes(config), tensors, str(directory))
    tokenizer = load_tokenizer(directory) if has_tokenizer(directory) else None
    raw = read_json(directory / CONFIG_FILE)
    if tokenizer is not None:
        check_vocabulary(tokenizer.num_rows, config.text.vocab_size, str(directory))
    # | source                                  | added rows                                   |
    # |-----------------------------------------|----------------------------------------------|
    # | llava-hf                                | taken off, and kept beside                   |
    # | converted from llava-hf earlier         | in the file that travels along               |
    # | anything else                           | none yet, see `added_rows.choose_vocabulary` |
    added = read_carried_vocabulary(directory, config.text.vocab_size)
    if source.kind == "hf":
        tensors, added = split_added_rows(raw, directory, tensors, config.text.vocab_size)
        config = replace(config, text=replace(config.text, vocab_size=added.base))
    if dtype is not None:
        tensors = {name: converted(entry, FLOAT_TYPES[dtype]) for name, entry in tensors.items()}
    facts = declared_files.Facts(
        config=config,
        processor=declared_files.complete_processor(config, source.processor),
        special_ids=_special_ids(raw, config.text, source.processor.get("eos_token_id", [])),
        dtype={value: key for key, value in FLOAT_TYPES.items()}[tensors["language_model.embed_tokens.weight"].dtype],
    )
    return Checkpoint(source.directory, facts, tensors, added)


def _special_ids(raw: dict[str, Any], text: DecoderConfig, ends: list[int]) -> dict[str, int | list[int]]:
    """The ids that the files declare; the family's own if they declare none or one of an added row.  Ids beyond the
    vocabulary are dropped.

    Args:
        raw: config.json.
        ends: all that end an answer, in the order of the files.
    """
    declared_ids = {**without_null(raw.get("text_config") or {}), **without_null(raw), "eos_token_id": ends}
    found: dict[str, int | list[int]] = {}
    for key in _SPECIAL_IDS:
        for value in (declared_ids.get(key), FAMILIES[text.model_type].special_ids[key]):
            several = value if isinstance(value, list) else [value]  # Llama 3 ends with one of several
            kept = [index for index in several if isinstance(index, int) and 0 <= index < text.vocab_size]
            if kept:
                found[key] = kept if len(kept) > 1 else kept[0]
                break
    return found
