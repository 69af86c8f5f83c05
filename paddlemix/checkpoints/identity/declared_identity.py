"""What the declared files of a model decide about its computation, and what differs between two models, in words.

Values are compared as the computation uses them, not as files: a copy of a model in another layout or dtype, or
quantised, has the same ones, and so has a file that was only formatted differently.  Tokenizers are compared by what
decides their ids; if that differs, their files show how, JSON by key.
"""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from paddlemix.checkpoints.files.weight_files import read_json
from paddlemix.checkpoints.layouts.config_keys import PROCESSOR_KEYS
from paddlemix.checkpoints.layouts.file_names import CONFIG_FILE
from paddlemix.declared import take
from paddlemix.errors import UserError
from paddlemix.identity import file_digest, listed, text_digest
from paddlemix.models.configuration import DecoderConfig, LlavaConfig, projector_depth
from paddlemix.processors.images.image_config import image_spec_from_dict
from paddlemix.processors.llava import PROCESSOR_FILE, LlavaProcessor
from paddlemix.processors.text.chat_template import read_template
from paddlemix.processors.text.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from paddlemix.processors.text.tokenizer_keys import CONFIG_FILE as TOKENIZER_CONFIG
from paddlemix.processors.text.tokenizer_keys import KEYS as TOKENIZER_KEYS

VISION = "vision_config."
# of the vision tower; its image size is chosen by a run, and the shapes of its weights determine the rest
_VISION_KEYS = ("num_attention_heads", "hidden_act", "norm_type", "qk_normalization", "outer_norms")
# of the language model; positions, heads and epsilon follow in `text_values`
_TEXT_KEYS = ("num_attention_heads", "sliding_window", "tie_word_embeddings")
_ABSENT = object()
_SHOWN = 80  # characters of a value


def computed_values(config: LlavaConfig) -> dict[str, Any]:
    """Key of `config.json` -> value, of everything the computation uses that no weight's shape determines.

    Returns:
        Plain values, as in JSON; keys of the tower begin with `VISION`.  Each value has one spelling here: layers and
        heads are counted, real numbers are floats.
    """
    # sizes are missing on purpose: a model of other sizes has weights of other shapes, and these are compared
    values, vision = text_values(config.text), config.vision
    if vision is not None:
        values["mm_projector_type"] = f"mlp{projector_depth(config.mm_projector_type)}x_gelu"
        values["mm_vision_select_layer"] = config.num_tower_layers
        values["mm_vision_select_feature"] = config.mm_vision_select_feature
        values |= {f"{VISION}{name}": getattr(vision, name) for name in _VISION_KEYS}
        values[f"{VISION}layer_norm_eps"] = float(vision.layer_norm_eps)
    return values


def text_values(text: DecoderConfig) -> dict[str, Any]:
    """The part of `computed_values` that is the language model's."""
    values = {name: getattr(text, name) for name in _TEXT_KEYS}
    values |= {"rms_norm_eps": float(text.rms_norm_eps), "rope_theta": float(text.rope_theta)}  # files may say 10000
    values |= {"num_key_value_heads": text.key_value_heads, "head_dim": text.head_size}
    values["rope_scaling"] = None if text.rope_scaling is None else dict(sorted(text.rope_scaling.items()))
    if text.rope.dynamic:  # otherwise it is not part of the computation
        values["max_position_embeddings"] = text.max_position_embeddings
    return values


def changed_config(then: Mapping[str, Any], config: LlavaConfig, directories: tuple[Path, Path]) -> list[str]:
    """What differs between the `computed_values` of a model and those of another, with the file that declares it.

    Keys that only one of them has are not compared: an earlier version may not have known them.

    Args:
        then: values of the first.
        config: sizes of the second.
        directories: of the second's own files and of its tower's, see `Pretrained.declared_directories`.
    """
    now = computed_values(config)
    changed = {key: (then[key], now[key]) for key in then if key in now and then[key] != now[key]}
    text, tower = directories
    return [
        *_described({key: pair for key, pair in changed.items() if not key.startswith(VISION)}, text / CONFIG_FILE),
        *_described({key: pair for key, pair in changed.items() if key.startswith(VISION)}, tower / CONFIG_FILE),
    ]


def changed_processor(checkpoint: Path, processor: LlavaProcessor, directories: tuple[Path, Path]) -> list[str]:
    """What differs between the tokenizer and processor in a checkpoint and those of a run, in words.

    Args:
        checkpoint: a directory of a whole model or an adapter that we wrote.
        processor: the run's.
        directories: of the run's model, see `Pretrained.declared_directories`.

    Raises:
        MissingFileError, UserError: a file of the checkpoint is missing or cannot be understood.
    """
    found = _changed_tokenizer(checkpoint, processor.tokenizer)
    then, now = _saved_values(checkpoint / PROCESSOR_FILE, processor), processor.to_dict()
    files: dict[Path, dict[str, tuple[Any, Any]]] = {}
    for key in then | now:
        if then.get(key) != now.get(key):
            files.setdefault(_file_with(key, processor, directories), {})[key] = (then.get(key), now.get(key))
    return found + [text for path, changed in files.items() for text in _described(changed, path)]


def _saved_values(path: Path, processor: LlavaProcessor) -> dict[str, Any]:
    """A saved `processor_config.json` as this version would write it for the same tokenizer."""
    saved = take(read_json(path), PROCESSOR_KEYS, str(path))
    try:
        spec, template = image_spec_from_dict(saved), read_template(saved["chat_template"])
    except KeyError as error:
        raise UserError(f"{path} has no key {error}; copy the checkpoint again") from error
    then = replace(processor, image_spec=spec, template=template, end_ids=tuple(saved.get("eos_token_id") or ()))
    return {**then.to_dict(), "mm_use_im_start_end": bool(saved.get("mm_use_im_start_end"))}


def _file_with(key: str, processor: LlavaProcessor, directories: tuple[Path, Path]) -> Path:
    """The file that declares a key of the processor: the first that has it, in their order of precedence."""
    own, tower = directories
    own = processor.tokenizer.directory or own  # of an adapter that a run continues
    for directory in dict.fromkeys((own, tower)):
        for path in [directory / PROCESSOR_FILE, *sorted(directory.glob("*_config.json")), directory / CONFIG_FILE]:
            # a search in the text is enough: the file is named to a person, who will open it
            if path.is_file() and f'"{key}"' in path.read_text(encoding="utf-8", errors="replace"):
                return path
    return own


def _changed_tokenizer(checkpoint: Path, tokenizer: Tokenizer) -> list[str]:
    directory = tokenizer.directory
    if directory is None or not checkpoint.is_dir():
        return []
    changed = _changed_tokenizer_files(checkpoint, directory)
    # other versions write the same tokenizer into other files, so files that differ are only a reason to compare ids
    return changed if changed and not load_tokenizer(checkpoint).encodes_like(tokenizer) else []


def _changed_tokenizer_files(checkpoint: Path, directory: Path) -> list[str]:
    found: list[str] = []
    for name in TOKENIZER_FILES:
        old, new = checkpoint / name, directory / name
        if (old.is_file(), new.is_file()) == (False, False) or _same_bytes(old, new):
            continue
        if not name.endswith(".json"):
            found.append(str(new))
            continue
        then, now = _tokenizer_values(old), _tokenizer_values(new)
        changed = {
            key: (then.get(key, _ABSENT), now.get(key, _ABSENT))
            for key in then.keys() | now.keys()
            if then.get(key, _ABSENT) != now.get(key, _ABSENT)
        }
        found += _described(dict(sorted(changed.items())), new)
    return found


def _tokenizer_values(path: Path) -> dict[str, Any]:
    """What decides about ids in a tokenizer's JSON file, by its keys; {} without the file."""
    left_out = {"model_max_length", *TOKENIZER_KEYS.harmless} if path.name == TOKENIZER_CONFIG else set()
    return {key: value for key, value in _json_object(path).items() if key not in left_out}


def declared_digests(config: LlavaConfig, processor: LlavaProcessor | None) -> dict[str, str]:
    """What the declared files of a model decide, for a comparison with files that are not available.

    Returns:
        "config.json: KEY", "processor: KEY", "FILE: KEY" of a tokenizer's JSON files, "FILE" of its others -> the value
        as JSON, or its digest if that is long; the same for a file that was only formatted differently.

    Raises:
        UserError: a file of the tokenizer cannot be read.
    """
    found = {f"{CONFIG_FILE}: {key}": value for key, value in computed_values(config).items()}
    if processor is not None:
        values = {**processor.to_dict(), "eos_token_id": sorted(processor.end_ids)}
        found |= {f"processor: {key}": value for key, value in values.items()}
    directory = None if processor is None else processor.tokenizer.directory
    for path in () if directory is None else (directory / name for name in TOKENIZER_FILES):
        if path.name.endswith(".json"):
            found |= {f"{path.name}: {key}": value for key, value in _tokenizer_values(path).items()}
        elif path.is_file():
            found[path.name] = file_digest(path)
    # sorted keys: the order of a JSON object means nothing
    texts = {name: json.dumps(value, sort_keys=True) for name, value in found.items()}
    return {name: text if len(text) <= _SHOWN else text_digest(text) for name, text in texts.items()}


def _same_bytes(old: Path, new: Path) -> bool:
    return old.is_file() and new.is_file() and filecmp.cmp(old, new, shallow=False)


def _json_object(path: Path) -> dict[str, Any]:
    """A JSON file's object; {} without the file.  Unlike other declared files, a tokenizer's may be of any size."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' cannot be read as JSON: {error}") from error
    return values if isinstance(values, dict) else {"": values}


def _described(changed: Mapping[str, tuple[Any, Any]], path: Path) -> list[str]:
    """Changed values of one file, in one text; [] if nothing changed."""
    parts = [part for key, (old, new) in changed.items() for part in _parts(key, old, new)]
    words = [f"{key} {_short(old)} -> {_short(new)}" for key, old, new in parts]
    return [f"{listed(words)} in {path}"] if words else []


def _parts(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """What differs inside a value, "rope_scaling.factor": two long objects look alike once a message cuts them."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        yield key, old, new
        return
    for name in old | new:
        then, now = old.get(name, _ABSENT), new.get(name, _ABSENT)
        if then != now:
            yield from _parts(f"{key}.{name}", then, now)


def _short(value: Any) -> str:
    if value is _ABSENT:
        return "(none)"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
