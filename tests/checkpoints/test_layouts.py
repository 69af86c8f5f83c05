"""A directory is recognised by what it holds, whatever it is called."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import paddle
import pytest

from paddlemix.checkpoints.keymap import PADDLEMIX
from paddlemix.checkpoints.layouts import FORMAT_KEY, FORMAT_VERSION, PREPROCESSOR_FILE, recognise
from paddlemix.checkpoints.pretrained import config_values, load_model
from paddlemix.errors import MissingFileError, UserError
from paddlemix.models.configuration import LlavaConfig
from paddlemix.processors.image import CLIP_MEAN
from tests.tiny_models import GOLDEN, tiny_llava, tiny_model, tiny_text

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 4}
CLIP_VISION = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3, "image_size": 28, "patch_size": 14}
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
        ("[]", "holds no JSON object"),
        ({FORMAT_KEY: FORMAT_VERSION + 1}, f"{FORMAT_KEY} {FORMAT_VERSION + 1} is newer .*update paddlemix"),
        ({FORMAT_KEY: 1}, "cannot be understood: KeyError"),
        ({**LLAMA, "hidden_act": "relu"}, "config.json: hidden_act 'relu' is not supported"),
        ({**LLAMA, "rope_scaling": {"type": "linear"}}, "rope_scaling .* does not fit; type 'linear' has factor"),
        ({**LLAMA, "rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling .* is not supported; allowed: null"),
        ({**LLAMA, "num_attention_heads": "four"}, "cannot be understood"),
        ({**LLAMA, "num_attention_heads": 0}, "cannot be understood"),
        ({"model_type": "llava", "text_config": "llama", "vision_config": {}}, "cannot be understood"),
        ({"model_type": "llava", "text_config": {}, "vision_config": {}, "vision_feature_layer": [1, 2]}, "understood"),
        (
            {"model_type": "llava", "text_config": {}, "vision_config": {}, "vision_feature_select_strategy": "x"},
            "cannot be understood",
        ),
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
    loaded = load_model(tmp_path).model
    for name, value in model.state_dict().items():
        assert (loaded.state_dict()[name] == value).all()
