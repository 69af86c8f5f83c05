"""Families of language models: their spellings, their files both ways, and what the decoder must not be asked for."""

from __future__ import annotations

import ast
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import paddlemix.models
from paddlemix.checkpoints.convert.export_model import convert_checkpoint
from paddlemix.checkpoints.convert.verify import Conversion
from paddlemix.checkpoints.files.weight_files import read_json, read_weights, write_json, write_weights
from paddlemix.checkpoints.layouts.added_rows import _declared_base
from paddlemix.checkpoints.layouts.families import FAMILIES, find_family, inside_llava, read_text, write_text
from paddlemix.checkpoints.layouts.recognise import config_values, recognise
from paddlemix.checkpoints.load import load_pretrained
from paddlemix.checkpoints.pretrained import parameter_entries
from paddlemix.checkpoints.source import Source
from paddlemix.errors import UserError
from paddlemix.models.configuration import DecoderConfig, LlavaConfig
from paddlemix.processors.text.chat_template import read_template
from tests.tiny_models import tiny_llava, tiny_model, tiny_text

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LLAMA_31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
TEXTS: dict[str, DecoderConfig] = {
    "llama": tiny_text(rope_scaling=LLAMA_31),
    "mistral": tiny_text(model_type="mistral", sliding_window=3, head_dim=8),
    "qwen2": tiny_text(model_type="qwen2", attention_bias=True, attention_output_bias=False, tie_word_embeddings=True),
    "internlm": tiny_text(model_type="internlm", attention_bias=True, num_key_value_heads=None, rope_scaling=DYNAMIC),
    "internlm2": tiny_text(model_type="internlm2", hidden_size=24, num_attention_heads=6, num_key_value_heads=2),
}
FLAGS = {  # fields of DecoderConfig that choose what is built or computed; all others are numbers
    "num_key_value_heads",
    "head_dim",
    "rope_scaling",
    "attention_bias",
    "attention_output_bias",
    "sliding_window",
    "tie_word_embeddings",
}


def meant(text: DecoderConfig) -> dict[str, Any]:
    return {**vars(text), "num_key_value_heads": text.key_value_heads, "head_dim": text.head_size} | {
        "attention_output_bias": text.output_bias
    }


def write_ours(config: LlavaConfig, directory: Path, **more: Any) -> Path:
    """A drawn model in our layout."""
    directory.mkdir()
    write_json(directory / "config.json", {**config_values(config), **more})
    image = {"image_size": 6, "patch_size": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    write_json(directory / "processor_config.json", {"chat_template": "plain", "image_aspect_ratio": "pad", **image})
    write_weights(directory, parameter_entries(tiny_model(config)), 10**9)
    return directory


def bits(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (entry.dtype, entry.shape, entry.read().tobytes()) for name, entry in read_weights(directory).items()}


def test_every_family_is_tried_and_its_template_exists() -> None:
    assert TEXTS.keys() == FAMILIES.keys()
    for family in FAMILIES.values():
        assert read_template(family.template).name == family.template


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", {"vocab_size": 32000, "attention_bias": False, "sliding_window": None}),
        ("mistral", {"intermediate_size": 14336, "key_value_heads": 8, "sliding_window": 4096, "output_bias": False}),
        ("qwen2", {"vocab_size": 151936, "attention_bias": True, "output_bias": False, "sliding_window": None}),
        (
            "internlm",
            {"vocab_size": 103168, "output_bias": True, "rope_scaling": {"rope_type": "dynamic", "factor": 1.0}},
        ),
        ("internlm2", {"vocab_size": 103168, "attention_bias": True, "rope_scaling": None}),
    ],
)
def test_what_a_file_leaves_out_is_the_familys_default(model_type: str, expected: dict[str, Any]) -> None:
    text = read_text({"model_type": model_type})
    assert text.model_type == model_type
    assert {key: getattr(text, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"model_type": "mistral", "sliding_window": None}, {"sliding_window": None}),
        ({"model_type": "mistral", "attention_bias": True}, {"attention_bias": False}),
        ({"model_type": "llama", "sliding_window": 7}, {"sliding_window": None}),
        ({"model_type": "llama", "num_key_value_heads": None}, {"key_value_heads": 32}),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0}, {"sliding_window": 4096}),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 32}, {"sliding_window": None}),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 32}, {"sliding_window": None}),
        ({"model_type": "mistral", "layer_types": ["sliding_attention"] * 32}, {"sliding_window": 4096}),
        ({"model_type": "internlm2", "bias": False}, {"attention_bias": False, "output_bias": False}),
        (
            {"model_type": "internlm", "bias": False, "rotary": {"base": 5000, "type": "origin"}},
            {"attention_bias": False, "rope_theta": 5000, "rope_scaling": None},
        ),
        (
            {"model_type": "internlm", "rotary": {"base": 10000, "type": "dynamic", "scaling_factor": 2.0}},
            {"rope_scaling": DYNAMIC},
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, {"rope_scaling": DYNAMIC}),
        ({"rope_scaling": {"type": "dynamic", **DYNAMIC}}, {"rope_scaling": DYNAMIC}),
        ({"rope_scaling": {"rope_type": "default"}}, {"rope_scaling": None}),
        (
            {"rope_parameters": {**LLAMA_31, "rope_theta": 5e5}},
            {"rope_scaling": LLAMA_31, "rope_theta": 5e5},
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, {"rope_scaling": None, "rope_theta": 7.0}),
    ],
)
def test_every_spelling_is_understood(values: dict[str, Any], expected: dict[str, Any]) -> None:
    text = read_text(values)
    assert {key: getattr(text, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model_type": "gemma"},
            "language model_type 'gemma' is not one of llama, mistral, qwen2, internlm, internlm2",
        ),
        ({"mlp_bias": True}, "mlp_bias is true; supported: false"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; supported: 1"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "a part of each head"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_scaling .* is not supported"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "rope_scaling .* is not supported"),
        ({"mm_resampler_type": "spatial_pool"}, r'mm_resampler_type is "spatial_pool" \(text\); supported: "identity"'),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 20},
            "sliding_window 4096 for the layers from 20 of 32 on .* is not supported; allowed: for all layers or none",
        ),
        (
            {"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention"]},
            "sliding_window 4096 .* is not supported",
        ),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_text(values)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("scaling", [None, DYNAMIC])
def test_what_is_written_is_read_back(text: DecoderConfig, scaling: dict[str, Any] | None) -> None:
    for config in (text, replace(text, rope_scaling=scaling)):
        assert meant(read_text(write_text(config))) == meant(config)


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        (tiny_text(model_type="mistral", attention_bias=True), "MistralForCausalLM has no place for .*attention_bias"),
        (tiny_text(sliding_window=3), "LlamaForCausalLM has no place for {'sliding_window': 3}"),
        (tiny_text(model_type="internlm"), "InternLMForCausalLM has no place for {'num_key_value_heads': 1}"),
        (
            tiny_text(attention_bias=True, attention_output_bias=False),
            "LlamaForCausalLM has no place for {'attention_output_bias': False}",
        ),
    ],
)
def test_what_a_family_cannot_say_is_refused(text: DecoderConfig, lost: str) -> None:
    with pytest.raises(UserError, match=lost):
        write_text(text)


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}, "llama"),
        ({"model_type": "llava"}, "llama"),
        ({"model_type": "llava_mistral"}, "mistral"),
        ({"model_type": "llava_qwen", "architectures": ["LlavaQwenForCausalLM"]}, "qwen2"),
        ({"model_type": "llava", "architectures": ["LlavaQwenForCausalLM"]}, "qwen2"),
    ],
)
def test_the_language_model_of_an_original_llava(config: dict[str, Any], family: str) -> None:
    assert find_family(config) == family


def test_a_llava_on_another_language_model_is_refused() -> None:
    with pytest.raises(UserError, match="'llava_mpt' with .*LlavaMptForCausalLM.* not supported as a language model"):
        find_family({"model_type": "llava_mpt", "architectures": ["LlavaMptForCausalLM"]})


@pytest.mark.parametrize("model_type", TEXTS)
def test_a_language_model_goes_to_its_own_form_and_back(tmp_path: Path, model_type: str) -> None:
    ours = write_ours(LlavaConfig(text=TEXTS[model_type]), tmp_path / "ours")
    convert_checkpoint(ours, tmp_path / "theirs", Conversion(to="hf"))
    values = read_json(tmp_path / "theirs" / "config.json")
    assert values["model_type"] == model_type
    assert values["architectures"] == [FAMILIES[model_type].architecture]
    assert meant(Source.open(tmp_path / "theirs").config.text) == meant(TEXTS[model_type])
    convert_checkpoint(tmp_path / "theirs", tmp_path / "again", Conversion(to="paddlemix"))
    assert bits(tmp_path / "again") == bits(ours)
    convert_checkpoint(tmp_path / "again", tmp_path / "third", Conversion(to="hf"))
    assert bits(tmp_path / "third") == bits(tmp_path / "theirs")
    first, second = (dict(load_pretrained(tmp_path / part).model.named_parameters()) for part in ("ours", "theirs"))
    for name, parameter in first.items():
        np.testing.assert_array_equal(parameter.numpy(), second[name].numpy())


def test_internlm2_files_have_its_names_and_its_joined_weights(tmp_path: Path) -> None:
    text = replace(TEXTS["internlm2"], attention_bias=True)
    ours = write_ours(LlavaConfig(text=text), tmp_path / "ours")
    convert_checkpoint(ours, tmp_path / "theirs", Conversion(to="hf"))
    tensors = {name: entry.read() for name, entry in read_weights(tmp_path / "theirs").items()}
    assert {name.replace("layers.1", "layers.0") for name in tensors} == {
        "model.tok_embeddings.weight",
        "model.norm.weight",
        "output.weight",
        *(f"model.layers.0.attention.{part}" for part in ("wqkv.weight", "wqkv.bias", "wo.weight", "wo.bias")),
        *(f"model.layers.0.feed_forward.w{part}.weight" for part in (1, 2, 3)),
        *(f"model.layers.0.{part}_norm.weight" for part in ("attention", "ffn")),
    }
    own = {name: entry.read() for name, entry in read_weights(ours).items()}
    for kind in ("weight", "bias"):
        prefix = "language_model.layers.1.self_attn"
        query, key, value = (
            own[f"{prefix}.{part}_proj.{kind}"].T.reshape([-1, 4, *[24][: kind == "weight"]]) for part in "qkv"
        )
        # six queries, two keys and values: queries 0 to 2, key 0, value 0, queries 3 to 5, key 1, value 1
        rows = [*query[:3], key[0], value[0], *query[3:], key[1], value[1]]
        np.testing.assert_array_equal(tensors[f"model.layers.1.attention.wqkv.{kind}"], np.concatenate(rows))


@pytest.mark.parametrize("model_type", TEXTS)
@pytest.mark.parametrize("to", ["llava", "hf"])
def test_llava_on_it_goes_to_the_other_layouts_and_back(tmp_path: Path, model_type: str, to: str) -> None:
    text = replace(TEXTS[model_type], tie_word_embeddings=False)
    ours = write_ours(tiny_llava(text=text, image_newline=False), tmp_path / "ours")
    convert_checkpoint(ours, tmp_path / to, Conversion(to=to))
    convert_checkpoint(tmp_path / to, tmp_path / "again", Conversion(to="paddlemix"))
    assert bits(tmp_path / "again") == bits(ours)
    expected = inside_llava(text)
    assert expected.model_type == {"internlm": "llama", "internlm2": "llama"}.get(model_type, model_type)
    assert meant(Source.open(tmp_path / "again").config.text) == meant(expected)
    if to == "llava":
        name = {"mistral": "LlavaMistral", "qwen2": "LlavaQwen"}.get(model_type, "LlavaLlama")
        assert read_json(tmp_path / to / "config.json")["architectures"] == [f"{name}ForCausalLM"]


@pytest.mark.parametrize("model_type", TEXTS)
def test_a_file_without_a_template_has_its_familys(tmp_path: Path, model_type: str) -> None:
    write_json(tmp_path / "config.json", write_text(TEXTS[model_type]))
    layout = recognise(tmp_path)
    assert (layout.kind, layout.processor["chat_template"]) == ("language", FAMILIES[model_type].template)


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ({"bos_token_id": 1, "eos_token_id": [2, 30], "pad_token_id": 9}, {"eos_token_id": [2, 30], "pad_token_id": 9}),
        ({"eos_token_id": 37}, {}),  # no row of the vocabulary, nor is any of Qwen's own
    ],
)
def test_special_ids_travel_as_far_as_they_are_known(
    tmp_path: Path, declared: dict[str, Any], expected: dict[str, Any]
) -> None:
    ours = write_ours(LlavaConfig(text=TEXTS["qwen2"]), tmp_path / "ours", **declared)
    convert_checkpoint(ours, tmp_path / "theirs", Conversion(to="hf"))
    values = read_json(tmp_path / "theirs" / "config.json")
    found = {key: values[key] for key in ("eos_token_id", "pad_token_id") if key in values}
    assert found == expected


def test_a_vocabulary_with_room_for_the_image_token_loses_no_rows(tmp_path: Path) -> None:
    """llava-next-72b-hf: `<image>` is 151646 of the 152064 rows that Qwen1.5 has; llava-1.5-7b-hf was extended."""
    write_json(tmp_path / "added_tokens.json", {"<image>": 10})
    write_json(tmp_path / "vocab.json", {str(index): index for index in range(8)})
    assert _declared_base(tmp_path, 10, 64) == 10
    assert _declared_base(tmp_path, 10, 65) == 65


def test_one_decoder_within_eight_flags_knows_no_family() -> None:
    """A family is data: no code of `models/` reads `model_type`, and the decoder stays small."""
    optional = {
        field.name for field in fields(DecoderConfig) if field.default is None or isinstance(field.default, bool)
    }
    assert optional == FLAGS and len(FLAGS) <= 8
    rooms = Path(paddlemix.models.__file__).parent
    assert len((rooms / "decoder.py").read_text(encoding="utf-8").splitlines()) <= 450
    for path in rooms.glob("*.py"):
        if path.name == "language_presets.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        read = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "model_type"]
        assert not read, path.name
