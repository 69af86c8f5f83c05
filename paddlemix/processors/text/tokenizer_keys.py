"""What the declared files of a tokenizer say, checked: `tokenizer_config.json`, `special_tokens_map.json`,
`added_tokens.json`.

Files of transformers 4 and 5 are read, whatever class saved them.  Makes no tokenizer.
Source: `save_pretrained` of transformers 4.36 to 5; their LlamaTokenizer, LlamaTokenizerFast and TokenizersBackend.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from paddlemix.declared import Keys, Rule, choice, either, flag, integer, items, key_names, mapping, take
from paddlemix.declared import text as text_rule
from paddlemix.errors import UserError
from paddlemix.json_files import read_object
from paddlemix.log import logger

CONFIG_FILE, SPECIAL_FILE, ADDED_FILE = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_TOKEN = either(text_rule, mapping)
_TOKENS = items(_TOKEN)


def _read_nothing(value: Any) -> dict[str, Any]:
    if value != {}:
        raise ValueError
    return {}


KEYS = Keys(
    {
        **dict.fromkeys(ROLES, _TOKEN),
        "tokenizer_class": text_rule,
        "auto_map": mapping,
        "legacy": flag,
        "add_prefix_space": flag,
        "add_bos_token": flag,
        "add_eos_token": flag,
        "added_tokens_decoder": mapping,
        "additional_special_tokens": _TOKENS,
        "extra_special_tokens": either(mapping, _TOKENS),
        "model_max_length": Rule("a number", lambda value: value),
    },
    {
        "sp_model_kwargs": Rule("{} (sampled pieces are not)", _read_nothing),
        "do_lower_case": choice(False),
        "remove_space": choice(False),
        "split_special_tokens": choice(False),
    },
    # of these, templates are checked elsewhere; the rest is about batches, about names, and about spaces in answers,
    # which are written as the tokens spell them
    key_names(
        """
        _from_pipeline added_tokens_file audio_token backend boi_token chat_template clean_up_tokenization_spaces
        device_map eoi_token errors from_slow image_token is_local local_files_only max_length merges_file
        model_input_names model_specific_special_tokens name_or_path pad_to_multiple_of pad_token_type_id padding
        padding_side processor_class response_schema return_tensors return_token_type_ids
        spaces_between_special_tokens special_tokens_map_file stride tokenizer_file tokenizer_type truncation
        truncation_side truncation_strategy trust_remote_code unsloth_version use_default_system_prompt use_fast
        verbose video_token vocab_file vocab_size
        """
    ),
)
_MOST_IDS = integer(0, 1 << 24)


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """The content of `tokenizer_config.json` with null, checked; empty where there is none.

    The other declared files of the tokenizer are checked too.

    Raises:
        UserError: a value is not allowed, or asks for ids that are not computed.
    """
    added, special, path = (directory / name for name in (ADDED_FILE, SPECIAL_FILE, CONFIG_FILE))
    if added.is_file():
        tokens = read_object(added)
        take(tokens, Keys(dict.fromkeys(tokens, _MOST_IDS)), str(added))
    if special.is_file():
        tokens = read_object(special)
        take(tokens, Keys(dict.fromkeys(tokens, either(_TOKEN, _TOKENS))), str(special))
    if not path.is_file():
        return {}
    values = read_object(path)
    known = take(values, KEYS, str(path))
    for index, token in known.get("added_tokens_decoder", {}).items():
        if not index.isdecimal() or not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise UserError(f'{path}: added_tokens_decoder["{index}"] is not an id with a token\'s "content"')
    # the answer's end is written, and trained, by the template: a second one would be trained as well
    if known.get("add_eos_token"):
        logger.warning("%s: add_eos_token is not applied; the template writes what ends an answer", path)
    return values


def loading_options(values: Mapping[str, Any], make: Callable[..., Any]) -> dict[str, Any]:
    """What a class of transformers must be told besides the file, so that it reads it as meant.

    Null counts as no key where the class has a default of its own (its `add_prefix_space` would else be false), but not
    for the roles of tokens, where null says that there is none.  A list of extra special tokens is what transformers 5
    writes for `additional_special_tokens`.

    Args:
        values: the file's content.
        make: the class's `__init__`.
    """
    parameters = inspect.signature(make).parameters
    options = {
        key: parameters[key].default
        for key, value in values.items()
        if value is None and key in parameters and key not in ROLES and parameters[key].default is not None
    }
    # null is as good as absent, but transformers fails on it here
    options |= {key: {} for key in ("added_tokens_decoder", "extra_special_tokens") if values.get(key, {}) is None}
    extra = values.get("extra_special_tokens")
    if isinstance(extra, list):
        options["extra_special_tokens"] = {}
        options["additional_special_tokens"] = [
            token["content"] if isinstance(token, dict) else token
            for token in (*extra, *(values.get("additional_special_tokens") or ()))
        ]
    return options
