"""The readers of single kinds of config.json; whole directories are in test_recognise.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paddlemix.checkpoints.layouts.config_keys import FORMAT_KEY
from paddlemix.checkpoints.layouts.config_readers import read_hf, read_language, read_ours, read_tower, tower_sizes
from paddlemix.checkpoints.layouts.recognise import config_values
from paddlemix.errors import UserError
from paddlemix.models.configuration import LlavaConfig
from tests.tiny_models import tiny_llava, tiny_text

TOWER = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}


def test_our_own_file_is_what_was_written(tmp_path: Path) -> None:
    layout = read_ours(config_values(tiny_llava()), tmp_path, "config.json")
    assert (layout.kind, layout.config) == ("paddlemix", tiny_llava())


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{FORMAT_KEY} 99 is newer than this version reads .1.; update paddlemix"):
        read_ours({**config_values(tiny_llava()), FORMAT_KEY: 99}, tmp_path, "config.json")


def test_of_two_copies_of_a_clip_tower_the_second_counts(tmp_path: Path) -> None:
    config: dict[str, Any] = {"model_type": "clip", "vision_config": {"hidden_size": 32, "intermediate_size": 100}}
    layout = read_tower({**config, "vision_config_dict": TOWER}, tmp_path, "config.json")
    assert layout.kind == "clip" and layout.config.vision is not None
    assert (layout.config.vision.hidden_size, layout.config.vision.intermediate_size) == (64, 100)
    assert tower_sizes(layout.config.vision) == {"image_size": 28, "patch_size": 14}
    assert layout.config.num_tower_layers == 2


def test_the_inner_file_of_llava_hf_decides_about_tying(tmp_path: Path) -> None:
    text: dict[str, Any] = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4}
    config: dict[str, Any] = {"model_type": "llava", "text_config": text, "vision_config": TOWER}
    config["tie_word_embeddings"] = True
    assert read_hf(config, tmp_path, "config.json").config.text.tie_word_embeddings
    text["tie_word_embeddings"] = False
    assert not read_hf(config, tmp_path, "config.json").config.text.tie_word_embeddings


def test_a_language_model_has_the_names_of_its_family_or_paddlenlp_s(tmp_path: Path) -> None:
    layout = read_language({"model_type": "llama", "vocab_size": 37, "eos_token_id": [2, 99]}, tmp_path, "config.json")
    assert [keymap.name for keymap in layout.keymaps] == ["Llama", "PaddleMIX"]
    assert layout.config == LlavaConfig(text=tiny_text(vocab_size=37, **_LLAMA_DEFAULTS))
    assert layout.processor == {"chat_template": "vicuna_v1", "eos_token_id": [2]}  # 99 is beyond the vocabulary


_LLAMA_DEFAULTS = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
}
