"""A directory is recognised by what it holds, whatever it is called."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import paddle
import pytest

from paddlemix.checkpoints.layouts.config_keys import FORMAT_KEY, FORMAT_VERSION
from paddlemix.checkpoints.layouts.image_settings import PREPROCESSOR_FILE
from paddlemix.checkpoints.layouts.recognise import config_values, recognise
from paddlemix.checkpoints.layouts.weight_names import PADDLEMIX
from paddlemix.checkpoints.load import load_pretrained
from paddlemix.errors import MissingFileError, UserError
from paddlemix.models.configuration import LlavaConfig
from paddlemix.processors.images.image_spec import CLIP_MEAN
from tests.tiny_models import GOLDEN, tiny_llava, tiny_model, tiny_text

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 4}
CLIP_VISION = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3, "image_size": 28, "patch_size": 14}
HF: dict[str, Any] = {"model_type": "llava", "text_config": {}, "vision_config": {}}
MISLEADING = ("eclipse/samples", "llama", "llava-v1.6-mistral-lora", "clip-vit-large-patch14-336", "hf")


def golden_config(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name / "config.json").read_text(encoding="utf-8"))


@pytest.fixture
def place(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a config.json into a new directory."""

    def write(config: Any, name: str = "model", **files: Any) -> Path:
        directory = tmp_path / name
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        for file, values in files.items():
            (directory / f"{file}.json").write_text(json.dumps(values))
        return directory

    return write


@pytest.mark.parametrize("name", MISLEADING)
@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (config_values(tiny_llava()), "paddlemix"),
        (golden_config("llava_v15_llama/original"), "original"),
        (golden_config("llava_v15_llama/hf"), "hf"),
        (golden_config("llava_v16_llama/hf"), "hf"),
        (LLAMA, "language"),
        ({**LLAMA, "model_type": "internlm2"}, "language"),
        (golden_config("llava_v15_llama/original/vision_tower"), "clip"),
        ({"model_type": "clip", "vision_config": CLIP_VISION, "text_config": {"hidden_size": 9}}, "clip"),
    ],
)
def test_the_content_decides_and_not_the_name(place: Callable[..., Path], config: Any, kind: str, name: str) -> None:
    assert recognise(place(config, name)).kind == kind


def test_our_own_config_is_read_back(place: Callable[..., Path]) -> None:
    layout = recognise(place(config_values(tiny_llava()), processor_config={"chat_template": "plain"}))
    assert layout.config == tiny_llava()
    assert layout.processor == {"chat_template": "plain"}


def test_both_layouts_of_a_model_declare_the_same(place: Callable[..., Path]) -> None:
    """The original's tower sizes come from the tower; all else is equal."""
    for name in ("llava_v15_llama", "llava_v16_llama"):
        hf, original = (recognise(GOLDEN / name / layout) for layout in ("hf", "original"))
        assert hf.config.text == original.config.text
        assert hf.config.image_newline is original.config.image_newline is (name == "llava_v16_llama")
        shared = hf.processor.keys() & original.processor.keys()
        assert {key: hf.processor[key] for key in shared} == {key: original.processor[key] for key in shared}
        assert (original.tower, original.tower_inside) == ("vision_tower", name == "llava_v16_llama")
        assert hf.processor["image_aspect_ratio"] == ("anyres" if name == "llava_v16_llama" else "pad")


def test_a_short_llava_hf_config_means_transformers_defaults(place: Callable[..., Path]) -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": {}}
    layout = recognise(place(config))
    assert layout.config.text.rms_norm_eps == 1e-6
    assert (layout.config.vision.hidden_size, layout.config.vision.image_size) == (1024, 336)


def test_a_short_clip_config_means_transformers_defaults(place: Callable[..., Path]) -> None:
    vision = recognise(place({"model_type": "clip", "vision_config": {"patch_size": 16}})).config.vision
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size) == (768, 12, 224, 16)


def test_an_original_config_without_newer_keys(place: Callable[..., Path]) -> None:
    """LLaVA-1.0 wrote no projector type, no merge type and no aspect mode."""
    layout = recognise(
        place({**LLAMA, "model_type": "llava", "mm_vision_tower": "openai/clip", "mm_vision_select_layer": -2})
    )
    assert layout.config.mm_projector_type == "linear"
    assert layout.processor["image_aspect_ratio"] == "square"
    assert layout.processor["mm_patch_merge_type"] == "flat"
    assert not layout.config.image_newline


@pytest.mark.parametrize("crop", [28, {"height": 28, "width": 28}])
def test_a_preprocessor_file_is_honoured(place: Callable[..., Path], crop: Any) -> None:
    declared = {"image_mean": [0.1, 0.2, 0.3], "crop_size": crop}
    layout = recognise(place(LLAMA | {"mm_vision_tower": "x"}, **{PREPROCESSOR_FILE.removesuffix(".json"): declared}))
    assert layout.processor["image_mean"] == [0.1, 0.2, 0.3]
    assert layout.processor["image_size"] == 28


def test_without_a_preprocessor_file_the_numbers_are_clips(place: Callable[..., Path]) -> None:
    assert recognise(place({"model_type": "clip_vision_model"})).processor["image_mean"] == list(CLIP_MEAN)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "bert", "architectures": ["BertModel"]},
            r"model_type 'bert' .*\['BertModel'\] is not supported; allowed",
        ),
        ({}, "model_type 'None' .* is not supported"),
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ({FORMAT_KEY: FORMAT_VERSION + 1}, f"{FORMAT_KEY} {FORMAT_VERSION + 1} is newer .*update paddlemix"),
        ({FORMAT_KEY: 1}, "has no text_config"),
        ({**LLAMA, "hidden_act": "relu"}, "config.json: hidden_act 'relu' is not supported"),
        ({**LLAMA, "rope_scaling": {"type": "linear"}}, "rope_scaling .* does not fit; type 'linear' has factor"),
        ({**LLAMA, "rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling .* is not supported; allowed: null"),
        ({**LLAMA, "num_attention_heads": "four"}, r'num_attention_heads is "four" \(text\); allowed: a whole number'),
        ({**LLAMA, "num_attention_heads": 0}, "num_attention_heads is 0; allowed: a whole number from 1"),
        (
            {**LLAMA, "num_hidden_layers": 10**9},
            "num_hidden_layers is 1000000000; allowed: a whole number from 1 to 1,0",
        ),
        ({**LLAMA, "vocab_size": 1e12}, r"vocab_size is 1000000000000.0; allowed: a whole number"),
        ({**LLAMA, "rms_norm_eps": float("nan")}, "rms_norm_eps is NaN; allowed: a number from 0 to 1"),
        ({**LLAMA, "tie_word_embeddings": "false"}, r'tie_word_embeddings is "false" \(text\); allowed: true or false'),
        ({**LLAMA, "rope_theta": [1]}, r"rope_theta is \[1\] \(a list\); allowed: a number"),
        ({**LLAMA, "rope_parameters": {"rope_theta": "1e4"}}, r'rope_parameters: rope_theta is "1e4" \(text\)'),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling's factor '2' is not a number"),
        ({**LLAMA, "alibi": True}, "alibi is true; supported: false"),
        ({"model_type": ["llama"]}, r'model_type is \["llama"\] \(a list\); allowed: a text'),
        ({"architectures": [{}]}, r"architectures is \[\{\}\] \(a list\); allowed: a list"),
        ({**LLAMA, "mm_vision_tower": "x", "mm_vision_select_layer": "-2"}, r'mm_vision_select_layer is "-2" \(text\)'),
        ({**LLAMA, "mm_vision_tower": 3}, "mm_vision_tower is 3; allowed: a text"),
        ({**LLAMA, "mm_vision_tower": []}, r"mm_vision_tower is \[\] \(a list\); allowed: a text, or a list of one"),
        ({**LLAMA, "mm_vision_tower": ["x", "y"]}, "mm_vision_tower is .* allowed: a text, or a list of one"),
        (
            {**LLAMA, "rope_scaling": {"type": ["linear"], "factor": 2}},
            "rope_scaling .* is not supported; allowed: null",
        ),
        (json.dumps(LLAMA)[:-1] + ', "hidden_size": 32}', "the key 'hidden_size' occurs twice"),
        ('{"a": ' + "[" * 9999 + "]" * 9999 + "}", "nested deeper than 64"),
        ({**HF, "text_config": "llama"}, r'text_config is "llama" \(text\); allowed: an object'),
        ({**HF, "vision_feature_layer": [1, 2]}, "vision_feature_layer: .* joins the features of 2 layers"),
        ({**HF, "vision_feature_layer": "-2"}, r'vision_feature_layer is "-2" \(text\); allowed: a whole number'),
        ({**HF, "vision_feature_select_strategy": "x"}, 'vision_feature_select_strategy is "x" .*"default", "full"'),
        ({**HF, "projector_hidden_act": "relu"}, r'projector_hidden_act is "relu" \(text\); supported: "gelu"'),
        ({**HF, "multimodal_projector_bias": False}, "multimodal_projector_bias is false; supported: true"),
        ({**HF, "use_image_newline_parameter": False}, "use_image_newline_parameter is false; supported: true"),
        ({**HF, "text_config": {"num_hidden_layers": "40"}}, r'text_config: num_hidden_layers is "40" \(text\)'),
        ({**HF, "vision_config": {"model_type": "siglip_vision_model"}}, "vision_config: model_type is .*only CLIP"),
        ({**HF, "vision_config": {"num_channels": 4}}, "vision_config: num_channels is 4; allowed: 3"),
        ({"model_type": "clip_vision_model", "layer_norm_eps": "1e-5"}, r'layer_norm_eps is "1e-5" \(text\)'),
        ({"model_type": "clip_vision_model", "layer_norm_eps": 0.01}, "layer_norm_eps is 0.01; allowed: .* 0 to 0.001"),
        ({**HF, "vision_config": {"layer_norm_eps": 0.01}}, "vision_config: layer_norm_eps is 0.01; allowed: a number"),
    ],
)
def test_what_cannot_be_read_names_the_file_and_the_value(
    place: Callable[..., Path], config: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        recognise(place(config))
    assert "config.json" in str(caught.value)


def test_a_missing_directory_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=f"'.*gone' does not exist .looked from {Path.cwd()}"):
        recognise(tmp_path / "gone")


def test_a_directory_without_config_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no config.json in .*holds nothing"):
        recognise(tmp_path)
    (tmp_path / "model.bin").touch()
    with pytest.raises(MissingFileError, match="holds model.bin"):
        recognise(tmp_path)


def test_a_llama_with_the_names_of_paddlenlp(tmp_path: Path) -> None:
    """The same config.json as transformers writes, other names of weights, linear weights not turned."""
    model = tiny_model(LlavaConfig(text=tiny_text()))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **asdict(model.config.text)}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    theirs = {PADDLEMIX.to_theirs(name): value for name, value in model.state_dict().items()}
    paddle.save(theirs, str(tmp_path / "model_state.pdparams"))
    loaded = load_pretrained(tmp_path).model
    for name, value in model.state_dict().items():
        assert (loaded.state_dict()[name] == value).all()


# config.json of published models, in full but for names of revisions
_VICUNA = {
    "_name_or_path": "vicuna-7b-v1.5",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "vocab_size": 32000,
}
_LLAVA_16 = {
    **_VICUNA,
    "architectures": ["LlavaLlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "freeze_mm_mlp_adapter": False,
    "freeze_mm_vision_resampler": False,
    "image_aspect_ratio": "anyres",
    "image_crop_resolution": 224,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "image_split_resolution": 224,
    "mm_hidden_size": 1024,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_vision_tower_lr": 2e-06,
    "model_type": "llava",
    "rope_theta": 10000.0,
    "tokenizer_model_max_length": 4096,
    "tokenizer_padding_side": "right",
    "tune_mm_mlp_adapter": False,
    "tune_mm_vision_resampler": False,
    "unfreeze_mm_vision_tower": True,
    "use_mm_proj": True,
}
_HF_15 = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.36.0.dev0",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}
_QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
_CLIP = {"hidden_size": 768, "image_size": 336, "model_type": "clip_vision_model", "patch_size": 14, "dropout": 0.0}


@pytest.mark.parametrize(
    "config",
    [
        _VICUNA,
        _LLAVA_16,
        _HF_15,
        _QWEN,
        {
            "model_type": "clip",
            "vision_config": _CLIP,
            "vision_config_dict": _CLIP,
            "text_config": {"hidden_size": 768},
        },
        *(golden_config(f"llava_v1{n}_llama/{layout}") for n in (5, 6) for layout in ("hf", "original")),
    ],
)
def test_published_files_hold_no_unknown_key(
    place: Callable[..., Path], config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    recognise(place(config))
    assert not caplog.records


def test_a_model_without_its_language_models_part_is_refused(place: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="config.json has no text_config, the sizes of the language model"):
        recognise(place({**_HF_15, "text_config": None}))


def test_null_says_no_key_but_where_a_class_has_another_default(place: Callable[..., Path]) -> None:
    full = recognise(place({**_HF_15, "vision_feature_layer": [-2]}))
    nulls = {"vision_feature_layer": None, "vision_feature_select_strategy": None, "projector_hidden_act": None}
    text = {**_HF_15["text_config"], "hidden_act": None, "head_dim": None, "rope_theta": None}
    assert recognise(place({**_HF_15, **nulls, "text_config": text}, "nulls")) == full
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    assert recognise(place(mistral, "absent")).config.text.sliding_window == 4096
    assert recognise(place({**mistral, "sliding_window": None}, "none")).config.text.sliding_window is None


def test_grids_of_both_files_are_the_same(place: Callable[..., Path]) -> None:
    grids = [[336, 672], [672, 336]]
    hf = {**_HF_15, "model_type": "llava_next", "image_grid_pinpoints": grids}
    for given in (None, grids, grids[::-1]):
        layout = recognise(place(hf, str(given), preprocessor_config={"image_grid_pinpoints": given}))
        assert layout.processor["image_grid_pinpoints"] == grids
    with pytest.raises(UserError, match=r"image_grid_pinpoints .* is not what preprocessor_config.json has, \[\[336"):
        recognise(place(hf, "other", preprocessor_config={"image_grid_pinpoints": [[336, 1008]]}))
    alone = {**hf, "image_grid_pinpoints": None}
    layout = recognise(place(alone, "alone", preprocessor_config={"image_grid_pinpoints": grids}))
    assert layout.processor["image_grid_pinpoints"] == grids


def test_a_runs_folder_names_the_models_inside(tmp_path: Path) -> None:
    for name in ("checkpoint-2", "checkpoint-4"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    with pytest.raises(MissingFileError, match="give one of the models inside, for example .*checkpoint-4"):
        recognise(tmp_path)


@pytest.mark.parametrize("place_of", ["chat_template", "tokenizer_config"])
def test_a_llama_with_its_own_chatml_is_no_vicuna(
    place: Callable[..., Path], place_of: str, caplog: pytest.LogCaptureFixture
) -> None:
    jinja = "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    layout = recognise(place(_HF_15, **{place_of: {"chat_template": jinja}}))
    assert layout.processor["chat_template"] == "qwen_1_5"
    assert "'qwen_1_5' is used (with the system text \"You are a helpful assistant.\")" in caplog.text
    named = recognise(place({**_HF_15, "chat_template_name": "mpt"}, "named", **{place_of: {"chat_template": jinja}}))
    assert named.processor["chat_template"] == "mpt"
    original = recognise(place({**_LLAVA_16}, "original", **{place_of: {"chat_template": jinja}}))
    assert original.processor["chat_template"] == "chatml_direct"  # LLaVA's own spelling of it


def test_a_llava_hf_processor_must_count_as_its_model_does(place: Callable[..., Path]) -> None:
    good = {"image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": 14, "processor_class": "X"}
    recognise(place(_HF_15, "good", processor_config={**good, "vision_feature_select_strategy": "default"}))
    for change, message in [
        ({"patch_size": 16}, "patch_size is 16, but config.json has 14"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is 'full', but config.json has"),
        ({"num_additional_image_tokens": 0}, "num_additional_image_tokens is 0; allowed: 1"),
    ]:
        with pytest.raises(UserError, match=f"processor_config.json: {message}"):
            recognise(place(_HF_15, str(change), processor_config={**good, **change}))
