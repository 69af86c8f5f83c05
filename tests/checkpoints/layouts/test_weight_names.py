"""Names of weights: a bijection for every layout, and the names that real files have."""

from __future__ import annotations

from pathlib import Path

import pytest

from paddlemix.checkpoints.files.weight_files import read_safetensors
from paddlemix.checkpoints.layouts.weight_names import (
    CLIP,
    HF_NEW,
    HF_OLD,
    INTERNLM2,
    LLAMA,
    ORIGINAL,
    OURS,
    PADDLEMIX,
    KeyMap,
    is_linear_weight,
)
from paddlemix.models.llava import LlavaModel
from tests.tiny_models import GOLDEN, tiny_llava

BEHIND_THE_TOWER = ("vision_tower.post_layernorm.weight", "vision_tower.post_layernorm.bias")


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, ...]]:
    """Every parameter of a small model with all parts, and the tower's last norm."""
    parameters = {name: tuple(value.shape) for name, value in LlavaModel(tiny_llava()).named_parameters()}
    return {**parameters, **dict.fromkeys(BEHIND_THE_TOWER, (10,))}


def names_for(keymap: KeyMap, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """The weights that a layout has a place for: a tower file holds only a tower, a Llama file none."""
    text = ("language_model.", "lm_head.")
    parts = {CLIP.name: ("vision_tower.",), LLAMA.name: text, INTERNLM2.name: text}.get(keymap.name, ("",))
    return [name for name in shapes if name.startswith(parts)]


@pytest.mark.parametrize(
    "keymap", [OURS, ORIGINAL, HF_OLD, HF_NEW, PADDLEMIX, LLAMA, CLIP, INTERNLM2], ids=lambda map: map.name
)
def test_names_go_there_and_back(keymap: KeyMap, shapes: dict[str, tuple[int, ...]]) -> None:
    names = names_for(keymap, shapes)
    theirs = [keymap.to_theirs(name) for name in names]
    assert len(set(theirs)) == len(names) > 20
    assert [keymap.to_ours(key) for key in theirs] == names


@pytest.mark.parametrize(
    ("path", "keymap"),
    [
        ("llava_v16_llama/hf", HF_OLD),
        ("llava_v16_llama/original", ORIGINAL),
        ("llava_v16_llama/original/vision_tower", CLIP),
    ],
)
def test_golden_files_hold_exactly_the_names_of_a_model(path: str, keymap: KeyMap) -> None:
    found = {keymap.to_ours(key) for key in read_safetensors(Path(GOLDEN / path / "model.safetensors"))}
    text = tiny_llava().text
    config = tiny_llava(text=type(text)(**{**vars(text), "num_hidden_layers": 3}), mm_vision_select_layer=-1)
    names = {name for name, _ in LlavaModel(config).named_parameters()} | set(BEHIND_THE_TOWER)
    assert found == {name for name in names if keymap is not CLIP or name.startswith("vision_tower.")}


@pytest.mark.parametrize(
    ("keymap", "ours", "theirs"),
    [
        (HF_NEW, "language_model.norm.weight", "model.language_model.norm.weight"),
        (HF_NEW, "projector.2.bias", "model.multi_modal_projector.linear_2.bias"),
        (HF_NEW, "vision_tower.pre_layernorm.bias", "model.vision_tower.vision_model.pre_layrnorm.bias"),
        (HF_NEW, "image_newline", "model.image_newline"),
        (ORIGINAL, "projector.weight", "model.mm_projector.weight"),  # "linear", as LLaVA-1.0 has it
        (PADDLEMIX, "language_model.layers.0.mlp.up_proj.weight", "llama.layers.0.mlp.up_proj.weight"),
        (PADDLEMIX, "projector.2.weight", "llama.mm_projector.2.weight"),
        (PADDLEMIX, "projector.bias", "llama.mm_projector.bias"),
        (PADDLEMIX, "image_newline", "llama.image_newline"),
        (PADDLEMIX, "vision_tower.class_embedding", "llama.vision_tower.vision_tower.vision_model.class_embedding"),
        (PADDLEMIX, "vision_tower.patch_embedding", "llama.vision_tower.vision_tower.vision_model.conv1.weight"),
        (
            PADDLEMIX,
            "vision_tower.position_embedding",
            "llama.vision_tower.vision_tower.vision_model.positional_embedding.weight",
        ),
        (PADDLEMIX, "vision_tower.pre_layernorm.bias", "llama.vision_tower.vision_tower.vision_model.ln_pre.bias"),
        (
            PADDLEMIX,
            "vision_tower.layers.1.mlp.fc2.bias",
            "llama.vision_tower.vision_tower.vision_model.transformer.layers.1.linear2.bias",
        ),
        (
            PADDLEMIX,
            "vision_tower.layers.1.layer_norm1.weight",
            "llama.vision_tower.vision_tower.vision_model.transformer.layers.1.norm1.weight",
        ),
        (
            PADDLEMIX,
            "vision_tower.layers.1.self_attn.out_proj.weight",
            "llama.vision_tower.vision_tower.vision_model.transformer.layers.1.self_attn.out_proj.weight",
        ),
    ],
)
def test_names_as_the_layouts_spell_them(keymap: KeyMap, ours: str, theirs: str) -> None:
    assert keymap.to_theirs(ours) == theirs
    assert keymap.to_ours(theirs) == ours


@pytest.mark.parametrize(
    ("keymap", "key"),
    [
        (LLAMA, "model.layers.0.self_attn.rotary_emb.inv_freq"),
        (CLIP, "vision_model.embeddings.position_ids"),
        (CLIP, "text_model.encoder.layers.0.mlp.fc1.weight"),
        (CLIP, "text_projection.weight"),
        (CLIP, "visual_projection.weight"),
        (CLIP, "logit_scale"),
    ],
)
def test_what_no_model_needs_is_left_out(keymap: KeyMap, key: str) -> None:
    assert keymap.to_ours(key) is None


@pytest.mark.parametrize(
    ("keymap", "key"),
    [
        (OURS, "other.weight"),
        (ORIGINAL, "transformer.weight"),
        (CLIP, "vision_model.head.weight"),
        (PADDLEMIX, "llama.vision_tower.vision_tower.vision_model.conv2.weight"),
        (HF_OLD, "multi_modal_projector.linear_3.weight"),
    ],
)
def test_an_unknown_name_is_no_weight_of_the_layout(keymap: KeyMap, key: str) -> None:
    with pytest.raises(KeyError):
        keymap.to_ours(key)


@pytest.mark.parametrize(
    ("keymap", "name"), [(HF_OLD, "projector.4.weight"), (LLAMA, "image_newline"), (CLIP, "vision_tower.head.weight")]
)
def test_a_layout_without_a_place_for_a_weight(keymap: KeyMap, name: str) -> None:
    with pytest.raises(KeyError):
        keymap.to_theirs(name)


def test_linear_weights_are_the_matrices_but_for_the_embedding(shapes: dict[str, tuple[int, ...]]) -> None:
    found = {name for name, shape in shapes.items() if is_linear_weight(name, shape)}
    assert "language_model.embed_tokens.weight" not in found
    assert "vision_tower.position_embedding" not in found
    assert {"lm_head.weight", "projector.0.weight", "vision_tower.layers.0.mlp.fc1.weight"} <= found
    assert len(found) == 2 * 7 + 2 * 6 + 2 + 1  # decoder layers, tower layers, projector, lm_head
