"""A checkpoint's tokenizer files in a conversion: llava-hf's added tokens are declared or removed.

Everything else is copied unchanged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paddlemix.checkpoints.files.weight_files import read_json, write_json
from paddlemix.checkpoints.layouts.added_rows import IMAGE_TOKEN, PAD_TOKEN
from paddlemix.processors.text.tokenizer import TOKENIZER_FILES

_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
_CONFIG, _SPECIAL, _ADDED, _FAST = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer's files, as far as they exist."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            (target / name).write_bytes((source / name).read_bytes())


def remove_added_tokens(directory: Path, base: int) -> None:
    """Removes tokens with ids >= `base` from the files in `directory`, in place."""
    removed: set[str] = set()

    def keep(token: str, index: int) -> bool:
        if index >= base:
            removed.add(token)
        return index < base

    def from_config(values: dict[str, Any]) -> None:
        declared = values.get("added_tokens_decoder") or {}
        kept = {index: token for index, token in declared.items() if keep(token["content"], int(index))}
        if declared:
            values["added_tokens_decoder"] = kept
        _forget(values, removed)
        values.pop("processor_class", None)  # llava-hf's, which would expect `<image>`

    def from_fast(values: dict[str, Any]) -> None:
        added = values.get("added_tokens") or []
        values["added_tokens"] = [token for token in added if keep(token["content"], int(token["id"]))]
        if (values.get("padding") or {}).get("pad_token") in removed:
            values["padding"] = None

    def from_added(values: dict[str, Any]) -> None:
        for token in [token for token, index in values.items() if not keep(token, int(index))]:
            del values[token]

    # The order matters: the first three say which tokens are removed, the last gives them no ids.
    _change(directory / _ADDED, from_added)
    _change(directory / _FAST, from_fast)
    _change(directory / _CONFIG, from_config)
    _change(directory / _SPECIAL, lambda values: _forget(values, removed))


def _forget(values: dict[str, Any], removed: set[str]) -> None:
    """Removes tokens from their roles; padding falls back to the unknown token, as in LLaVA."""
    for role, token in list(values.items()):
        name = token["content"] if isinstance(token, dict) and "content" in token else token
        if isinstance(name, str) and name in removed:
            del values[role]
    unknown = values.get("unk_token")
    if "pad_token" not in values and unknown is not None:
        values["pad_token"] = unknown
    # the same list by two names: transformers 5 writes the first, 4 the second
    extra = values.pop("extra_special_tokens", None)
    if isinstance(extra, list):  # as transformers 5 writes them; transformers 4 has names for them
        values["extra_special_tokens"] = [token for token in extra if _content(token) not in removed]
    several = values.get("additional_special_tokens")
    if isinstance(several, list):
        values["additional_special_tokens"] = [token for token in several if _content(token) not in removed]


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def declare_added_tokens(directory: Path, image_token: int) -> None:
    """Declares `<image>` and, right after it, `<pad>` in the files in `directory`, in place."""
    tokens = {IMAGE_TOKEN: image_token, PAD_TOKEN: image_token + 1}

    def in_config(values: dict[str, Any]) -> None:
        declared = values["added_tokens_decoder"] = values.get("added_tokens_decoder") or {}
        declared |= {str(index): {"content": token, **_FLAGS} for token, index in tokens.items()}
        values |= {
            "pad_token": PAD_TOKEN,
            "image_token": IMAGE_TOKEN,
            "extra_special_tokens": {"image_token": IMAGE_TOKEN},
        }

    def in_fast(values: dict[str, Any]) -> None:
        kept = [token for token in values.get("added_tokens") or [] if token["content"] not in tokens]
        values["added_tokens"] = kept + [{"id": index, "content": token, **_FLAGS} for token, index in tokens.items()]

    def in_special(values: dict[str, Any]) -> None:
        flags = {key: value for key, value in _FLAGS.items() if key != "special"}
        values["pad_token"] = {"content": PAD_TOKEN, **flags}

    # only this file is created: a sentencepiece tokenizer may come without it, and it is the one that all versions read
    _change(directory / _CONFIG, in_config, create=True)
    _change(directory / _FAST, in_fast)
    _change(directory / _SPECIAL, in_special)
    _change(directory / _ADDED, lambda values: values.update(tokens))


def _change(path: Path, change: Any, create: bool = False) -> None:
    if not path.is_file() and not create:
        return
    values = read_json(path) if path.is_file() else {"tokenizer_class": "LlamaTokenizer"}
    change(values)
    write_json(path, values)
