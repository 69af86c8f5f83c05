"""The chat template that a checkpoint of another program declares, compared with ours by its markers.

    template_by_markers(directory, "vicuna_v1")    # "qwen_1_5" where the files' template writes <|im_start|>

The files' template is Jinja, a program; it is never run.  Its markers (`<|im_start|>`, `[INST]`, `USER:`) tell which of
our templates writes the same turns; the text of the system message is ours, which is said.
Source: chat templates of llava-hf, meta-llama, mistralai, Qwen, 01-ai, internlm, google, HuggingFaceH4 and microsoft.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paddlemix.declared import without_null
from paddlemix.errors import UserError
from paddlemix.json_files import read_object, read_text
from paddlemix.log import logger
from paddlemix.processors.text.known_templates import TEMPLATES

_JINJA = "chat_template.jinja"
_IN_JSON = ("chat_template.json", "processor_config.json", "tokenizer_config.json")
# What a template writes -> the template of ours that writes it, the first that fits.  "upper" is how llava-hf's files
# make USER and ASSISTANT of a role.
_MARKERS = (
    (re.compile(r"<\|start_header_id\|>"), "llava_llama_3"),
    (re.compile(r"<\|im_end\|>(['\"]\s*[+~]\s*['\"])?(\\n|\n)"), "qwen_1_5"),
    (re.compile(r"<\|im_start\|>"), "chatml_direct"),
    (re.compile(r"<start_of_turn>"), "gemma_instruct"),
    (re.compile(r"<\|end\|>(['\"]\s*[+~]\s*['\"])?(\\n|\n)"), "xtuner_phi3_chat"),
    (re.compile(r"<\|end\|>"), "phi3_chat"),
    (re.compile(r"<\|user\|>"), "mistral_zephyr"),
    (re.compile(r"<<SYS>>"), "llama_2"),
    (re.compile(r"\[INST\]"), "mistral_instruct"),
    (re.compile(r"<\|User\|>"), "internlm"),
    (re.compile(r"<human>"), "internvl_zh"),
    (re.compile(r"###"), "v0"),
    (re.compile(r"USER|ASSISTANT|\.upper\(\)|\|\s*upper"), "vicuna_v1"),
)
_SPEAKERS = re.compile(
    r"<\|start_header_id\|>|<\|im_start\|>|<start_of_turn>|<\|user\|>|\[INST\]|<\|User\|>|USER|###|<human>"
)
_told: set[tuple[str, str]] = set()


def template_by_markers(directory: Path, usual: str, variants: Mapping[str, str] | None = None) -> str:
    """The name of the template of ours for a directory whose files name none of ours.

    Args:
        usual: that of the language model's family.
        variants: name -> what is used instead.

    Returns:
        `usual` where the files have no template, one with the same markers, or one that none of ours resembles; else
        the one that its markers name.  A warning names the choice and its reason, once for each directory.
    """
    found = find_chat_template(directory)
    # the files' template            -> the result
    # none                           -> the family's usual one
    # unlike any of ours             -> the usual one, with a warning
    # turns begin as in the usual    -> the usual one: only its system text or spaces may differ
    # otherwise                      -> the one of its markers, with a warning
    if found is None:
        return usual
    text, path = found
    name = next((name for marker, name in _MARKERS if marker.search(text)), None)
    name = (variants or {}).get(name or "", name)
    if name is None:
        _tell(path, f"no template here marks turns as it does, so '{usual}' of the model's family is used")
        return usual
    if _speaker(name) == _speaker(usual):
        return usual
    system = TEMPLATES[name].system
    said = f"with the system text {json.dumps(system[:60])}" if system else "without a system text"
    _tell(path, f"by its markers '{name}' is used ({said}), not '{usual}' of the model's family")
    return name


def _speaker(name: str) -> str:
    """What begins a user's turn in a template of ours: the same in variants of one family."""
    found = _SPEAKERS.search(TEMPLATES[name].user) or _SPEAKERS.search(TEMPLATES[name].first_user)
    return name if found is None else found[0]


def _tell(path: Path, words: str) -> None:
    # a checkpoint is opened several times in one run
    if (str(path), words) not in _told:
        _told.add((str(path), words))
        logger.warning(
            "%s holds a chat template, a program that is not run; %s; another one: chat_template in a run's file, "
            "--conv-mode of chat and predict",
            path,
            words,
        )


def find_chat_template(directory: Path) -> tuple[str, Path] | None:
    """The Jinja text that a directory declares and the file that has it, in the order of transformers' processors.

    Raises:
        UserError: a file cannot be read.
    """
    if (directory / _JINJA).is_file():
        return read_text(directory / _JINJA), directory / _JINJA
    for name in _IN_JSON:
        path = directory / name
        text = _jinja_of(without_null(read_object(path)), path) if path.is_file() else None
        if text:
            return text, path
    return None


def _jinja_of(values: dict[str, Any], path: Path) -> str | None:
    value = values.get("chat_template")
    if isinstance(value, list):  # several with names, of which "default" counts
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default", next(iter(named.values()), None))
    # told apart by type: transformers' templates are texts
    if isinstance(value, dict):  # a template of ours, in our own processor_config.json
        return None
    if value is not None and not isinstance(value, str):
        raise UserError(f"{path}: chat_template is neither a text nor a list of named ones")
    return value
