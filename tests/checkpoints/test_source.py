"""A checkpoint joined from its parts: where the tower is looked for and whose weights win."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from paddlemix.checkpoints.files.tensors import TensorEntry, array_entry
from paddlemix.checkpoints.files.weight_files import SINGLE_FILE, read_weights, write_json, write_weights
from paddlemix.checkpoints.hub.part_places import find_part
from paddlemix.checkpoints.layouts.weight_names import CLIP, HF_NEW, HF_OLD, LLAMA
from paddlemix.checkpoints.source import Source, rename, transposed
from paddlemix.errors import MissingFileError, UserError
from tests.tiny_models import GOLDEN, draw

ORIGINAL = GOLDEN / "llava_v16_llama" / "original"
CLASS_TOKEN = "vision_tower.class_embedding"
INSIDE_CLASS_TOKEN = "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """A copy whose tower beside it has another class token than the tower inside."""
    directory = Path(shutil.copytree(ORIGINAL, tmp_path / "original"))
    beside = directory / "vision_tower"
    tensors = read_weights(beside)
    name = "vision_model.embeddings.class_embedding"
    changed = {key: array_entry(np.array(entry.read())) for key, entry in tensors.items()}
    write_weights(beside, {**changed, name: array_entry(np.full(48, 9.0, dtype="float32"))}, 10**9)
    return directory


def change_config(directory: Path, **values: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    write_json(directory / "config.json", {**config, **values})


def class_token(directory: Path) -> np.ndarray:
    return np.array(Source.open(directory).tensors()[CLASS_TOKEN].read())  # a copy: the file is written again


@pytest.mark.parametrize("trained", [True, False])
def test_a_trained_tower_inside_wins_over_the_one_beside_it(original: Path, trained: bool) -> None:
    change_config(original, unfreeze_mm_vision_tower=trained)
    inside = read_weights(original)[INSIDE_CLASS_TOKEN].read()
    np.testing.assert_array_equal(class_token(original), inside if trained else np.full(48, 9.0))


def test_a_tower_that_is_not_inside_is_taken_from_beside(original: Path) -> None:
    left = {name: array_entry(np.array(e.read())) for name, e in read_weights(original).items() if "vision" not in name}
    write_weights(original, left, 10**9)
    np.testing.assert_array_equal(class_token(original), np.full(48, 9.0))


def test_sizes_and_pixels_of_the_tower_are_declared_by_the_tower(original: Path) -> None:
    source = Source.open(original)
    assert source.config.vision == Source.open(original / "vision_tower").config.vision
    assert (source.processor["image_size"], source.processor["patch_size"]) == (28, 14)
    assert source.processor["image_aspect_ratio"] == "anyres"


def test_both_layouts_give_the_same_weights() -> None:
    hf, original = (Source.open(GOLDEN / "llava_v16_llama" / layout).tensors() for layout in ("hf", "original"))
    assert hf.keys() == original.keys()
    for name in hf:
        np.testing.assert_array_equal(hf[name].read(), original[name].read())


def test_a_missing_tower_says_where_it_looked(original: Path) -> None:
    shutil.move(original / "vision_tower", original.parent / "elsewhere")
    change_config(original, mm_vision_tower="openai/clip-tiny")
    with pytest.raises(MissingFileError) as caught:
        Source.open(original)
    message = str(caught.value)
    assert "the vision tower 'openai/clip-tiny'" in message
    for place in (original / "openai/clip-tiny", original / "clip-tiny", original.parent / "clip-tiny"):
        assert str(place) in message


@pytest.mark.parametrize("place", ["original/openai/clip-tiny", "original/clip-tiny", "clip-tiny"])
def test_a_tower_named_as_on_a_hub_is_found_inside_or_beside(tmp_path: Path, place: str) -> None:
    (tmp_path / "original").mkdir()
    (tmp_path / place).mkdir(parents=True)
    assert find_part(tmp_path / "original", "openai/clip-tiny", "vision tower") == tmp_path / place


def test_a_tower_that_is_none_is_refused(original: Path) -> None:
    change_config(original / "vision_tower", model_type="llama", hidden_act="silu")
    with pytest.raises(UserError, match="mm_vision_tower 'vision_tower' .* is not a vision tower"):
        Source.open(original)


def test_a_whole_clip_model_is_a_tower(original: Path) -> None:
    """The text half that openai's checkpoints carry along is left out."""
    tower = original / "vision_tower"
    before = class_token(tower)
    vision = json.loads((tower / "config.json").read_text())
    write_json(tower / "config.json", {"model_type": "clip", "vision_config": vision, "text_config": {}})
    tensors: dict[str, TensorEntry] = {
        name: array_entry(np.array(entry.read())) for name, entry in read_weights(tower).items()
    }
    text = {name: array_entry(draw(2)) for name in ("text_model.x", "text_projection.weight", "logit_scale")}
    write_weights(tower, {**tensors, **text, "visual_projection.weight": array_entry(draw(2, 2))}, 10**9)
    source = Source.open(tower)
    assert source.kind == "clip"
    assert all(name.startswith("vision_tower.") for name in source.tensors())
    np.testing.assert_array_equal(class_token(tower), before)


def test_linear_weights_are_turned_and_nothing_else() -> None:
    tensors = {
        "model.layers.0.mlp.up_proj.weight": array_entry(draw(3, 2)),
        "model.embed_tokens.weight": array_entry(draw(4, 2)),
        "model.norm.weight": array_entry(draw(2)),
    }
    renamed = rename(tensors, (LLAMA,), Path("x"))
    up = renamed["language_model.layers.0.mlp.up_proj.weight"]
    assert up.shape == (2, 3)
    np.testing.assert_array_equal(up.read(), draw(3, 2).T)
    assert up.read().flags.c_contiguous
    np.testing.assert_array_equal(renamed["language_model.embed_tokens.weight"].read(), draw(4, 2))
    np.testing.assert_array_equal(transposed(up).read(), draw(3, 2))


def test_the_first_layout_that_knows_every_name_is_used() -> None:
    newer = {"model.language_model.norm.weight": array_entry(draw(2)), "lm_head.weight": array_entry(draw(3, 2))}
    assert rename(newer, (HF_OLD, HF_NEW), Path("x")).keys() == {"language_model.norm.weight", "lm_head.weight"}


def test_unknown_weights_are_listed() -> None:
    tensors = {
        "vision_model.post_layernorm.bias": array_entry(draw(2)),
        "vision_model.head.weight": array_entry(draw(2)),
    }
    with pytest.raises(
        UserError, match="x holds 1 weights that a CLIP checkpoint does not have: vision_model.head.weight"
    ):
        rename(tensors, (CLIP,), Path("x"))
    many = {f"head.{number}": array_entry(draw(2)) for number in range(9)}
    with pytest.raises(UserError, match=r"x holds 9 weights .*: head.0, .*, head.7$"):  # the first eight
        rename(many, (CLIP,), Path("x"))


def test_a_missing_weight_file_is_named(original: Path) -> None:
    (original / SINGLE_FILE).unlink()
    with pytest.raises(MissingFileError, match=f"expected {SINGLE_FILE}"):
        Source.open(original).tensors()
