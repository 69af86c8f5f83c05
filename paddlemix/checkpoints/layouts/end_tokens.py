"""Which tokens end an answer, and what else `generation_config.json` declares: the ids of a checkpoint.

Source: transformers' GenerationConfig and how `generate` uses it; without the file config.json decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paddlemix.checkpoints.files.weight_files import read_json
from paddlemix.declared import Keys, anything, either, integer, items, key_names, take, without_null
from paddlemix.log import logger

GENERATION_FILE = "generation_config.json"
_ID = integer(-1, 1 << 31)
_IDS = either(_ID, items(_ID))
# Settings that change even the likeliest answer, with the values that do not.
_CHANGING: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({},),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "forced_decoder_ids": ([],),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
    "stop_strings": ([],),
}
KEYS = Keys(
    {"bos_token_id": _ID, "eos_token_id": _IDS, "pad_token_id": _ID, **dict.fromkeys(_CHANGING, anything)},
    {},
    # how answers are sampled is decided by a command's flags; the rest does not concern the answer
    key_names(
        """
        _from_model_config assistant_confidence_threshold assistant_early_exit cache_config cache_implementation
        chat_format compile_config constraints decoder_start_token_id diversity_penalty do_sample dola_layers
        early_stopping epsilon_cutoff eta_cutoff force_words_ids is_assistant length_penalty low_memory max_length
        max_matching_ngram_size max_new_tokens max_time max_window_size min_p num_assistant_tokens
        num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_attentions
        output_hidden_states output_logits output_scores penalty_alpha prefill_chunk_size prompt_lookup_num_tokens
        remove_invalid_values renormalize_logits return_dict_in_generate return_legacy_cache target_lookbehind
        assistant_lookbehind temperature token_healing top_h top_k top_p transformers_version trust_remote_code
        typical_p use_cache use_mtp watermarking_config use_model_defaults disable_compile decode_strategy
        """
    ),
)
_warned: set[str] = set()  # files whose warning was logged in this process


def read_generation(directory: Path) -> dict[str, Any]:
    """The ids that a directory's `generation_config.json` declares, checked; empty without the file.

    Raises:
        UserError: a value is not allowed.
    """
    path = directory / GENERATION_FILE
    if not path.is_file():
        return {}
    # Not applied, because training and evaluation here are of the plain model; but a user who compares answers with
    # transformers' must know.
    found = take(read_json(path), KEYS, str(path))
    ignored = [f"{key} {found[key]}" for key, usual in _CHANGING.items() if key in found and found[key] not in usual]
    if ignored and str(path) not in _warned:
        _warned.add(str(path))
        logger.warning("%s: %s is not applied", path, ", ".join(ignored))
    return {key: value for key, value in found.items() if key not in _CHANGING}


def declared_ends(configs: Mapping[str, Any], directory: Path, vocab_size: int) -> list[int]:
    """The tokens that end an answer, as far as the files declare them.

    Args:
        configs: values of config.json, including the inner ones of a language model.
        vocab_size: an id beyond it is never generated and is dropped.
    """
    # generation_config.json wins over config.json; Llama 3 ends with one of several
    generation = read_generation(directory).get("eos_token_id")
    declared = generation if generation is not None else without_null(configs).get("eos_token_id")
    several = declared if isinstance(declared, list) else [declared]
    return list(dict.fromkeys(index for index in several if index is not None and 0 <= index < vocab_size))
