"""Directory <-> model: strict, complete, and the same bits after every round."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest

from paddlemix.checkpoints.adapters.base_check import base_mark
from paddlemix.checkpoints.base_model import BaseSpec
from paddlemix.checkpoints.files import weight_files
from paddlemix.checkpoints.files.tensors import TensorEntry, array_entry
from paddlemix.checkpoints.files.weight_files import INDEX_FILE, read_weights, write_json, write_weights
from paddlemix.checkpoints.layouts.file_names import ADAPTER_FILE
from paddlemix.checkpoints.layouts.recognise import config_values
from paddlemix.checkpoints.load import load_base, load_pretrained
from paddlemix.checkpoints.pretrained import Pretrained, build_model, fill_model, parameter_entries, save_model
from paddlemix.errors import MissingFileError, UserError
from paddlemix.models.configuration import LlavaConfig
from paddlemix.models.llava import LlavaModel
from tests.tiny_models import GOLDEN, GOLDEN_MODELS, draw, tiny_llava, tiny_model, tiny_text

LAYOUTS = [f"{name}/{layout}" for name in GOLDEN_MODELS for layout in ("hf", "original")]


def bits(directory: Path) -> dict[str, tuple[str, bytes]]:
    """Name -> dtype and bytes of every weight of a directory."""
    return {name: (entry.dtype, entry.read().tobytes()) for name, entry in read_weights(directory).items()}


def own(tensors: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The same tensors in memory, free of the file they came from."""
    return {name: array_entry(np.array(entry.read()), entry.dtype) for name, entry in tensors.items()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A tiny model in our own layout, whole tower included."""
    directory = tmp_path / "saved"
    save_model(Pretrained(tiny_model(tiny_llava(mm_vision_select_layer=-1)), None, directory), directory)
    write_json(directory / "config.json", config_values(tiny_llava()))  # from now on the last layer is not used
    return directory


@pytest.mark.parametrize("path", LAYOUTS)
def test_every_weight_survives_load_and_save_bit_for_bit(tmp_path: Path, path: str) -> None:
    """Tower layers behind the selected one too, though the model does not build them."""
    loaded = load_pretrained(GOLDEN / path)
    assert len(loaded.unused) == 16 + 2  # one tower layer and the last norm
    save_model(loaded, tmp_path / "first")
    first = bits(tmp_path / "first")
    again = load_pretrained(tmp_path / "first")
    assert again.model.config == loaded.model.config
    save_model(again, tmp_path / "second", max_shard_bytes=100_000)
    assert (tmp_path / "second" / INDEX_FILE).is_file()
    assert bits(tmp_path / "second") == first
    assert len(first) == len(list(loaded.model.named_parameters())) + len(loaded.unused)


def test_both_layouts_are_saved_alike(tmp_path: Path) -> None:
    for layout in ("hf", "original"):
        save_model(load_pretrained(GOLDEN / "llava_v16_llama" / layout), tmp_path / layout)
    assert bits(tmp_path / "hf") == bits(tmp_path / "original")


def test_saving_in_place_again_and_again_loses_nothing(saved: Path) -> None:
    """The unused weights do not hang on the file that the first save replaces."""
    before, loaded = bits(saved), load_pretrained(saved)
    for limit in (10**9, 2000, 10**9):
        save_model(loaded, saved, limit)
        assert bits(saved) == before
    shutil.rmtree(saved)
    save_model(loaded, saved)
    assert bits(saved) == before


def test_a_save_that_fails_leaves_the_old_model(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, loaded = bits(saved), load_pretrained(saved)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(weight_files.os, "fsync", full_disk)
        with pytest.raises(UserError, match="cannot write .*No space left on device"):
            save_model(loaded, saved)
    assert bits(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_loaded_weights_are_those_of_the_file(saved: Path) -> None:
    loaded = load_pretrained(saved)
    assert not loaded.model.training
    assert loaded.processor is None
    entries = read_weights(saved)
    for name, parameter in loaded.model.named_parameters():
        np.testing.assert_array_equal(parameter.numpy(), entries[name].read())


def test_missing_extra_and_misshapen_weights_are_listed_together(saved: Path) -> None:
    tensors = own(read_weights(saved))
    del tensors["language_model.norm.weight"], tensors["projector.2.bias"]
    tensors["language_model.layers.7.mlp.up_proj.weight"] = array_entry(draw(2))
    tensors["lm_head.weight"] = array_entry(draw(37, 12))
    write_weights(saved, tensors, 10**9)
    with pytest.raises(UserError) as caught:
        load_pretrained(saved)
    assert str(caught.value) == (
        f"the weights of {saved} do not fit its config.json: "
        "2 missing: language_model.norm.weight, projector.2.bias; "
        "1 extra: language_model.layers.7.mlp.up_proj.weight; "
        "1 misshapen: lm_head.weight is [37, 12], expected [12, 37]"
    )


def test_a_long_list_is_shortened(saved: Path) -> None:
    write_weights(saved, {}, 10**9)
    count = len(list(LlavaModel(tiny_llava()).named_parameters()))
    with pytest.raises(UserError, match=f"{count} missing: image_newline, .* and {count - 8} more"):
        load_pretrained(saved)


@pytest.mark.parametrize(
    "name",
    ["vision_tower.layers.0.self_attn.rel_pos", "vision_tower.layers.x.weight", "vision_tower.post_layernorm.extra"],
)
def test_an_unknown_weight_of_the_tower_is_extra_and_not_unused(saved: Path, name: str) -> None:
    tensors = own(read_weights(saved))
    write_weights(saved, {**tensors, name: array_entry(draw(2))}, 10**9)
    with pytest.raises(UserError, match=f"1 extra: {name}"):
        load_pretrained(saved)


def test_a_tied_model_ignores_the_copy_of_its_embedding() -> None:
    config = LlavaConfig(text=tiny_text(tie_word_embeddings=True))
    source = tiny_model(config)
    tensors = {**parameter_entries(source), "lm_head.weight": array_entry(draw(12, 37))}
    target = build_model(config)
    assert fill_model(target, tensors, "x") == {}
    np.testing.assert_array_equal(
        target.language_model.embed_tokens.weight.numpy(), source.language_model.embed_tokens.weight.numpy()
    )


def test_named_parts_may_be_missing() -> None:
    source, target = tiny_model(), build_model(tiny_llava(), initialise=True)
    start = target.projector[0].weight.numpy()
    tensors = {name: entry for name, entry in parameter_entries(source).items() if not name.startswith("projector.")}
    fill_model(target, tensors, "x", may_miss=lambda name: name.startswith("projector."))
    np.testing.assert_array_equal(target.projector[0].weight.numpy(), start)
    assert np.abs(start).max() > 0


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 values after a cast to `dtype`: to nearest, ties to even."""
    if dtype == "float16":
        return values.astype("float16").astype("float32")
    raw = values.view("uint32")
    return ((raw + 0x7FFF + (raw >> 16 & 1)) & 0xFFFF0000).astype("uint32").view("float32")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_weights_are_the_rounded_ones(saved: Path, tmp_path: Path, dtype: str) -> None:
    """Loaded, saved and loaded again; nothing is computed, CPU has no kernels for these types."""
    entries, loaded = read_weights(saved), load_pretrained(saved, dtype)
    assert paddle.get_default_dtype() == "float32"
    for name, parameter in loaded.model.named_parameters():
        assert str(parameter.dtype) == f"paddle.{dtype}"
        np.testing.assert_array_equal(parameter.astype("float32").numpy(), rounded(entries[name].read(), dtype))
    save_model(loaded, tmp_path / "low")
    low = read_weights(tmp_path / "low")
    assert {low[name].dtype for name, _ in loaded.model.named_parameters()} == {"F16" if dtype == "float16" else "BF16"}
    assert {low[name].dtype for name in loaded.unused} == {"F32"}
    wide = load_pretrained(tmp_path / "low")
    for name, parameter in wide.model.named_parameters():
        np.testing.assert_array_equal(parameter.numpy(), rounded(entries[name].read(), dtype))


def test_a_built_model_is_zeros_or_drawn() -> None:
    zeros, drawn = build_model(tiny_llava()), build_model(tiny_llava(), initialise=True)
    matrices = [name for name, parameter in zeros.named_parameters() if len(parameter.shape) > 1]
    for name in matrices:
        assert not dict(zeros.named_parameters())[name].numpy().any()
        assert dict(drawn.named_parameters())[name].numpy().std() == pytest.approx(0.02, rel=0.5)
    assert drawn.image_newline.numpy().std() == pytest.approx(12**-0.5, rel=0.6)


def test_a_missing_tower_says_where_it_looked(tmp_path: Path) -> None:
    directory = tmp_path / "llava"
    shutil.copytree(GOLDEN / "llava_v15_llama" / "original", directory, ignore=shutil.ignore_patterns("vision_tower"))
    with pytest.raises(
        MissingFileError, match=f"searched {directory}/vision_tower.*place its directory at one of these"
    ):
        load_pretrained(directory)


def test_an_adapter_and_a_tower_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a vision tower, expected a language model; set mm_vision_tower to it"):
        load_pretrained(GOLDEN / "llava_v15_llama" / "original" / "vision_tower")
    write_json(tmp_path / ADAPTER_FILE, {})
    with pytest.raises(UserError, match="is an adapter, expected a whole model; merge it first"):
        load_base(BaseSpec(model=str(tmp_path)))


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_the_mark_of_a_base_does_not_depend_on_the_type_it_is_loaded_in(tmp_path: Path, stored: str) -> None:
    """Small numbers among the weights, which float16 rounds away and bfloat16 has."""
    model = tiny_model()
    small = model.language_model.embed_tokens.weight
    small.set_value(small * 1e-6)
    narrow = build_model(model.config, stored)
    for target, source in zip(narrow.parameters(), model.parameters(), strict=True):
        target.set_value(source.astype(stored))
    save_model(Pretrained(narrow, None, tmp_path / "base"), tmp_path / "base")
    spec = BaseSpec(model=str(tmp_path / "base"))
    marks = {base_mark(load_base(spec, dtype)) for dtype in ("float32", "bfloat16", "float16")}
    assert len(marks) == 1
