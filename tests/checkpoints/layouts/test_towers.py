"""InternViT's files: names, joined weights, image sizes, normalisation, and InternVL-Chat-LLaVA around them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.checkpoints.base_model import BaseSpec
from paddlemix.checkpoints.convert.export_model import convert_checkpoint
from paddlemix.checkpoints.convert.verify import Conversion
from paddlemix.checkpoints.files.tensors import array_entry
from paddlemix.checkpoints.files.weight_files import read_json, read_weights, write_json, write_weights
from paddlemix.checkpoints.layouts import towers
from paddlemix.checkpoints.layouts.recognise import recognise
from paddlemix.checkpoints.layouts.tower_positions import interpolate
from paddlemix.checkpoints.load import load_base, load_pretrained
from paddlemix.checkpoints.pretrained import Pretrained, save_model
from paddlemix.checkpoints.sizes import read_sizes
from paddlemix.checkpoints.source import Source
from paddlemix.errors import MissingFileError, UserError
from paddlemix.models.configuration import LlavaConfig
from paddlemix.processors.images.image_spec import CLIP_MEAN, IMAGENET_MEAN, IMAGENET_STD, ImageSpec
from paddlemix.processors.images.tiles import normalise_tiles
from tests.tiny_models import tiny_intern_vit, tiny_llava, tiny_model, tiny_vision, weights_of

# what the files of InternViT-6B-224px leave out or say, at a tiny size; a tower that reads 224 pixels as 2 x 2 patches
TOWER_CONFIG = {
    "model_type": "intern_vit_6b",
    "architectures": ["InternVisionModel"],
    "hidden_size": 10,
    "intermediate_size": 17,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 224,
    "patch_size": 112,
    "initializer_factor": 0.1,
    "qkv_bias": False,
    "qk_normalization": True,
    "drop_path_rate": 0.0,
    "use_flash_attn": True,
}
VISION = tiny_intern_vit(image_size=224, patch_size=112)
INSIDE = "model.vision_tower.vision_tower."
POSITIONS = "embeddings.position_embedding"


def change_config(directory: Path, **values: Any) -> None:
    write_json(directory / "config.json", {**read_json(directory / "config.json"), **values})


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A model with an InternViT that reads 336 pixels, in our layout."""
    vision = replace(VISION, image_size=336)
    model = tiny_model(tiny_llava(vision=vision, image_newline=False, mm_vision_select_layer=-1))
    save_model(Pretrained(model, None, tmp_path), tmp_path / "ours")
    pixels = {**towers.INTERN_VIT_FORM.pixels(), "image_size": 336, "patch_size": 112}
    values = {"chat_template": "vicuna_v1", "image_aspect_ratio": "pad", **pixels}
    write_json(tmp_path / "ours" / "processor_config.json", values)
    return tmp_path / "ours"


@pytest.fixture
def internvl(ours: Path) -> Path:
    """The same as InternVL publishes it: weights of the tower inside, no preprocessor file, the tower named by path."""
    directory = ours.parent / "internvl"
    convert_checkpoint(ours, directory, Conversion(to="llava"))
    (directory / "preprocessor_config.json").unlink()
    change_config(directory, mm_vision_tower="./pretrained/InternViT-Tiny-224px", unfreeze_mm_vision_tower=False)
    tower = (directory / "vision_tower").rename(ours.parent / "intern_vit_tiny_224px")
    small = {**read_weights(tower)}
    small = {name: array_entry(np.array(entry.read()) + 1) for name, entry in small.items()}
    small[POSITIONS] = array_entry(np.ones((1, 5, 10), dtype="float32"))
    write_weights(tower, small, 10**9)
    write_json(tower / "config.json", TOWER_CONFIG)
    return directory


def test_a_tower_is_recognised_by_what_its_config_says(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", TOWER_CONFIG)
    layout = recognise(tmp_path)
    assert layout.kind == "intern_vit"
    assert layout.config.vision == VISION
    assert layout.processor["image_mean"] == list(IMAGENET_MEAN)
    write_json(tmp_path / "config.json", {"model_type": "intern_vit_6b"})
    vision = recognise(tmp_path).config.vision
    assert vision is not None
    assert (vision.hidden_size, vision.num_hidden_layers, vision.norm_type) == (3200, 48, "rms_norm")
    assert (vision.layer_scale, vision.outer_norms, vision.patch_bias) == (0.1, False, True)


def test_normalisation_is_declared_by_files_and_not_by_names(tmp_path: Path) -> None:
    """A preprocessor file wins; a folder that is called after CLIP changes nothing."""
    directory = tmp_path / "clip-vit-large-patch14-336"
    directory.mkdir()
    write_json(directory / "config.json", TOWER_CONFIG)
    assert recognise(directory).processor["image_std"] == list(IMAGENET_STD)
    write_json(directory / "preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]})
    assert recognise(directory).processor["image_mean"] == [0.1, 0.2, 0.3]
    write_json(directory / "config.json", {"model_type": "clip_vision_model"})
    (directory / "preprocessor_config.json").unlink()
    assert recognise(directory).processor["image_mean"] == list(CLIP_MEAN)


def test_pixels_are_normalised_by_imagenets_numbers() -> None:
    from PIL import Image

    spec = ImageSpec(tile_size=4, patch_size=2, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    found = normalise_tiles([Image.new("RGB", (4, 4), (0, 128, 255))], spec)[0]
    wanted = [
        (value / 255 - mean) / std for value, mean, std in zip((0, 128, 255), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    ]
    np.testing.assert_allclose(found[:, 0, 0], wanted, rtol=1e-6)


def test_internvl_names_and_shapes_are_written_and_read_back_bit_for_bit(ours: Path) -> None:
    target = ours.parent / "llava"
    convert_checkpoint(ours, target, Conversion(to="llava"))
    found = {name.removeprefix(INSIDE): entry for name, entry in read_weights(target).items() if INSIDE in name}
    alone = read_weights(target / "vision_tower")
    assert {name: entry.shape for name, entry in alone.items()} == {name: e.shape for name, e in found.items()}
    assert found["embeddings.class_embedding"].shape == (1, 1, 10)
    assert found[POSITIONS].shape == (1, 10, 10)
    assert found["encoder.layers.1.attn.qkv.weight"].shape == (30, 10)
    per_layer = {name.split(".", 3)[3] for name in found if name.startswith("encoder.layers.0.")}
    norms = {"norm1.weight", "norm2.weight", "ls1", "ls2", "attn.q_norm.weight", "attn.k_norm.weight"}
    linears = {"attn.qkv.weight", "attn.proj.weight", "attn.proj.bias"}
    linears |= {f"mlp.{part}.{kind}" for part in ("fc1", "fc2") for kind in ("weight", "bias")}
    assert per_layer == norms | linears
    weights = weights_of(load_pretrained(ours).model)
    queries, keys, values = (weights[f"vision_tower.layers.1.self_attn.{part}_proj.weight"].T for part in "qkv")
    np.testing.assert_array_equal(
        found["encoder.layers.1.attn.qkv.weight"].read(), np.concatenate([queries, keys, values]).astype("float32")
    )
    convert_checkpoint(target, ours.parent / "again", Conversion(to="paddlemix"))
    before, behind = read_weights(ours), read_weights(ours.parent / "again")
    assert before.keys() == behind.keys()
    for name, entry in before.items():
        np.testing.assert_array_equal(entry.read(), behind[name].read())
    assert (
        read_json(ours / "config.json")["vision_config"]
        == read_json(target.parent / "again" / "config.json")["vision_config"]
    )


def test_the_tower_inside_and_its_positions_win_over_the_named_one(internvl: Path, ours: Path) -> None:
    """The folder is found though the name is spelt otherwise; 10 positions inside mean 336 pixels, 5 beside 224."""
    source = Source.open(internvl)
    assert source.config.vision == replace(VISION, image_size=336)
    assert source.processor["image_size"] == 336
    assert source.processor["image_mean"] == list(IMAGENET_MEAN)
    wanted = Source.open(ours).tensors()
    for name, entry in source.tensors().items():
        np.testing.assert_array_equal(entry.read(), wanted[name].read())
    assert read_sizes(BaseSpec(model=str(internvl))).config == source.config


def test_the_first_448_pixel_tower_has_two_names(internvl: Path) -> None:
    """InternVL's scripts read from InternViT-6B-448px what is published as InternViT-6B-448px-V1-0."""
    change_config(internvl, mm_vision_tower="./pretrained/InternViT-Tiny-448px", mm_vision_select_layer=-4)
    (internvl.parent / "intern_vit_tiny_224px").rename(internvl.parent / "intern_vit_tiny_448px_v1_0")
    assert Source.open(internvl).config.vision == replace(VISION, image_size=336)


def test_positions_of_the_named_tower_are_interpolated_where_none_are_inside(internvl: Path) -> None:
    tensors = read_weights(internvl)
    left = {name: array_entry(np.array(entry.read())) for name, entry in tensors.items() if INSIDE not in name}
    write_weights(internvl, left, 10**9)
    tower = internvl.parent / "intern_vit_tiny_224px"
    stored = np.random.RandomState(0).randn(1, 5, 10).astype("float32")
    others = {name: array_entry(np.array(entry.read())) for name, entry in read_weights(tower).items()}
    write_weights(tower, {**others, POSITIONS: array_entry(stored)}, 10**9)
    model = load_pretrained(internvl).model
    found = model.vision_tower.position_embedding.numpy()
    np.testing.assert_array_equal(found, interpolate(stored[0], 3))


def test_a_declared_size_wins_over_the_rule(internvl: Path) -> None:
    """Our own files and InternVL's trainer since: 224 pixels where the checkpoint says so."""
    write_json(internvl / "preprocessor_config.json", {"crop_size": {"height": 224, "width": 224}})
    source = Source.open(internvl)
    assert source.config.vision == VISION
    assert source.tensors()["vision_tower.position_embedding"].shape == (5, 10)


def test_a_tower_inside_that_is_nowhere_else_must_be_a_published_one(internvl: Path, monkeypatch: Any) -> None:
    (internvl.parent / "intern_vit_tiny_224px").rename(internvl.parent / "elsewhere")
    with pytest.raises(
        MissingFileError, match=r"the vision tower './pretrained/InternViT-Tiny-224px' .* was not found"
    ):
        Source.open(internvl)
    monkeypatch.setitem(towers.TOWERS, "tiny", VISION)
    source = Source.open(internvl)
    assert source.config.vision == replace(VISION, image_size=336)
    assert source.processor["image_mean"] == list(IMAGENET_MEAN)


@pytest.mark.parametrize(("size", "rows"), [(None, 5), (336, 10), (448, 17)])
def test_a_tower_is_attached_at_any_image_size(internvl: Path, size: int | None, rows: int) -> None:
    tower = internvl.parent / "intern_vit_tiny_224px"
    text = internvl.parent / "text"
    save_model(Pretrained(tiny_model(LlavaConfig(text=tiny_llava().text)), None, text), text)
    spec = BaseSpec(model=str(text), tower=str(tower), vision_image_size=size, mm_vision_select_layer=-4)
    loaded = load_base(spec)
    assert loaded.model.vision_tower.position_embedding.shape == [rows, 10]
    assert len(loaded.model.vision_tower.layers) == 0  # -4 of 3 layers is the embedding
    assert read_sizes(spec).config == loaded.model.config
    np.testing.assert_allclose(loaded.model.vision_tower.position_embedding.numpy(), 1, rtol=1e-5)


def test_a_loaded_model_may_read_another_size(internvl: Path) -> None:
    loaded = load_base(BaseSpec(model=str(internvl), vision_image_size=224))
    assert loaded.model.config.vision == VISION
    stored = read_weights(internvl)[INSIDE + POSITIONS].read()[0]
    np.testing.assert_array_equal(loaded.model.vision_tower.position_embedding.numpy(), interpolate(stored, 2))


def test_other_layouts_say_that_they_have_no_place(ours: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="llava-hf has no place for an InternViT tower"):
        convert_checkpoint(ours, tmp_path / "hf", Conversion(to="hf"))
    with pytest.raises(UserError, match="is neither CLIP's nor InternViT's"):
        towers.tower_form(tiny_vision(patch_bias=True))


def test_positions_that_no_grid_has_are_named(internvl: Path) -> None:
    tensors = {**read_weights(internvl), INSIDE + POSITIONS: array_entry(np.ones((1, 8, 10), dtype="float32"))}
    write_weights(internvl, {name: array_entry(np.array(e.read())) for name, e in tensors.items()}, 10**9)
    with pytest.raises(UserError, match="a table of 8 position embeddings"):
        Source.open(internvl)


def test_a_runs_file_says_what_size_is_read() -> None:
    from paddlemix.config.load import load_config
    from paddlemix.trainer.run_model import base_spec

    given = ["model_name_or_path=m", "output_dir=o", "vision_image_size=336"]
    assert base_spec(load_config(None, given)).vision_image_size == 336
    assert base_spec(load_config(None, given[:2])).vision_image_size is None
    with pytest.raises(UserError, match="vision_image_size"):
        load_config(None, [*given[:2], "vision_image_size=0"])


def test_only_a_table_of_positions_is_fitted() -> None:
    """A LLaVA checkpoint without its tower has none; InternViT's file has an axis before the others."""
    assert towers.fit_positions({}, VISION) == {}
    table = array_entry(np.zeros((1, 10, 4), np.float32))
    assert towers.fit_positions({towers.POSITIONS: table}, VISION) == {towers.POSITIONS: table}


def test_towers_of_another_form_keep_their_parts_apart() -> None:
    part = {"vision_tower.layers.0.self_attn.q_proj.weight": array_entry(np.zeros((2, 2), np.float32))}
    assert towers.join_tower(part, tiny_vision()) == towers.join_tower(part, None) == part


def test_a_published_language_model_alone_has_no_sizes_of_a_projector() -> None:
    spec = BaseSpec(model="lmsys/vicuna-7b-v1.5", starts_projector=True)
    with pytest.raises(UserError, match="mm_vision_tower is missing: lmsys/vicuna-7b-v1.5 is a language model alone"):
        read_sizes(spec)
