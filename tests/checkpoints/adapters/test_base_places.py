"""An adapter's base is found where it is: beside the adapter or at its old place, and never another model there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from paddlemix.checkpoints.adapters.adapter import read_adapter
from paddlemix.checkpoints.adapters.base_places import base_of
from paddlemix.checkpoints.files.weight_files import (
    read_json,
    read_metadata,
    read_safetensors,
    write_json,
    write_safetensors,
)
from paddlemix.checkpoints.hub.part_places import searched
from paddlemix.checkpoints.layouts.config_keys import FORMAT_KEY
from paddlemix.checkpoints.layouts.file_names import ADAPTER_FILE, ADAPTER_WEIGHTS
from paddlemix.checkpoints.load import load_pretrained
from paddlemix.errors import MissingFileError, UserError
from paddlemix.processors.llava import PROCESSOR_FILE
from paddlemix.trainer.recipe import run_recipe
from tests.tiny_world import LORA, World


@pytest.fixture(scope="module")
def made(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/ad, an adapter with a checkpoint, of models/base; models/other is another model."""
    root = tmp_path_factory.mktemp("places")
    shutil.copytree(world.model, root / "models" / "base")
    values = {"model_name_or_path": str(root / "models" / "base"), "max_steps": 1, "save_strategy": "steps"}
    run_recipe(world.config(root / "runs" / "ad", **values, save_steps=1, **LORA))
    other = world.config(root / "models" / "other", max_steps=1, learning_rate=0.1, lr_scheduler_type="constant")
    run_recipe(other)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy of it elsewhere; the absolute place in it is still that of the original."""
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def as_of_an_earlier_version(adapter: Path, with_digests: bool = False) -> None:
    """What was written before: relative to a hidden folder inside the result's, and without digests of the base."""
    values = read_json(adapter / "lora_config.json")
    if not adapter.name.startswith("checkpoint-"):
        values["base"]["relative"]["model"] = os.path.join("..", values["base"]["relative"]["model"])
    write_json(adapter / "lora_config.json", values)
    if not with_digests:
        path = adapter / ADAPTER_WEIGHTS
        tensors = read_safetensors(path)
        write_safetensors(adapter / "new", tensors, {"format": "paddlemix"})
        os.replace(adapter / "new", path)
        assert "digests" not in json.dumps(read_metadata(path))


def move_away(made: Path, root: Path) -> None:
    """Nothing is any more at the absolute place that the copy names."""
    for adapter in (root / "runs" / "ad", root / "runs" / "ad" / "checkpoint-1"):
        text = (adapter / "lora_config.json").read_text(encoding="utf-8")
        (adapter / "lora_config.json").write_text(text.replace(str(made), "/nowhere"), encoding="utf-8")


def place(adapter: Path) -> Path:
    return Path(base_of(read_adapter(adapter)).model).resolve()


@pytest.mark.parametrize("adapter", ["runs/ad", "runs/ad/checkpoint-1"])
def test_the_place_is_relative_to_where_the_adapter_ends_up(made: Path, adapter: str) -> None:
    relative = read_json(made / adapter / "lora_config.json")["base"]["relative"]["model"]
    assert relative == os.path.relpath(made / "models" / "base", made / adapter)


def test_each_searched_place_is_named_once(root: Path) -> None:
    adapter = root / "runs" / "ad"
    values = read_json(adapter / "lora_config.json")
    (root / "link").symlink_to(root / "models")
    shutil.rmtree(root / "models" / "base")
    for folder in ("models", "link"):
        values["base"]["model"] = str(root / folder / "base")
        write_json(adapter / "lora_config.json", values)
        with pytest.raises(MissingFileError) as caught:
            base_of(read_adapter(adapter))
        looked = str(caught.value).partition("(searched ")[2].partition(")")[0].split(", ")
        assert str(root / "models" / "base") in looked
        assert len({os.path.realpath(path) for path in looked}) == len(looked)
    assert searched([Path("a"), Path("b/../a"), Path.cwd() / "a"]) == f"searched {Path.cwd() / 'a'}"
    assert searched([root / "link" / ".." / "x"]) == f"searched {root / 'x'}"


@pytest.mark.parametrize("adapter", ["runs/ad", "runs/ad/checkpoint-1"])
@pytest.mark.parametrize("digests", [True, False])
def test_adapters_of_earlier_versions_load(made: Path, root: Path, adapter: str, digests: bool) -> None:
    move_away(made, root)
    as_of_an_earlier_version(root / adapter, digests)
    assert place(root / adapter) == root / "models" / "base"
    load_pretrained(root / adapter)


@pytest.mark.parametrize("digests", [True, False])
def test_another_model_at_the_wrongly_computed_place_is_not_taken(made: Path, root: Path, digests: bool) -> None:
    as_of_an_earlier_version(root / "runs" / "ad", digests)
    shutil.copytree(root / "models" / "other", root.parent / "models" / "base")  # one level too far up
    load_pretrained(root / "runs" / "ad")
    move_away(made, root)
    assert place(root / "runs" / "ad") == root / "models" / "base"
    shutil.rmtree(root / "models" / "base")
    with pytest.raises(UserError, match="trained on another base than"):
        load_pretrained(root / "runs" / "ad")


def test_of_two_models_the_one_with_the_bases_weights_is_taken(made: Path, root: Path) -> None:
    shutil.rmtree(root / "models" / "base")
    shutil.copytree(root / "models" / "other", root / "models" / "base")  # where the copy's base was
    assert place(root / "runs" / "ad") == made / "models" / "base"
    move_away(made, root)
    with pytest.raises(UserError, match="trained on another base than"):
        load_pretrained(root / "runs" / "ad")


def test_of_two_models_with_the_same_weights_the_one_that_computes_alike_is_taken(made: Path, root: Path) -> None:
    config = root / "models" / "base" / "config.json"
    values = read_json(config)
    values["text_config"]["rope_theta"] = 50000.0
    write_json(config, values)
    assert place(root / "runs" / "ad") == made / "models" / "base"


def test_of_two_places_one_that_cannot_be_read_is_not_taken(made: Path, root: Path) -> None:
    (root / "models" / "base" / "config.json").write_text("{", encoding="utf-8")
    assert place(root / "runs" / "ad") == made / "models" / "base"


def test_a_link_to_the_folder_of_a_run_does_not_shift_the_place(world: World, tmp_path: Path) -> None:
    from paddlemix.checkpoints.adapters.base_places import base_reference
    from paddlemix.checkpoints.base_model import BaseSpec

    (tmp_path / "far" / "away" / "runs").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "far" / "away" / "runs")
    (tmp_path / "base").mkdir()
    relative = base_reference(BaseSpec(model=str(tmp_path / "base")), tmp_path / "runs" / "ad")["relative"]["model"]
    assert os.path.realpath(tmp_path / "runs" / "ad" / ".." / "..") != str(tmp_path)
    (tmp_path / "runs" / "ad").mkdir()
    assert (tmp_path / "runs" / "ad" / relative).samefile(tmp_path / "base")


@pytest.mark.parametrize(
    ("base", "problem"),
    [
        ("base", r'base is "base" .text., expected an object'),
        ({"tower": "t"}, "base names no model"),
        ({"model": 3}, "model is 3; allowed: a text"),
        ({"model": "m", "relative": "../m"}, "relative is .* allowed: an object, each value a text"),
        ({"model": "m", "relative": {"model": 1.5}}, "relative is .* allowed: an object, each value a text"),
        ({"model": "m", "mm_vision_select_layer": "-2"}, 'mm_vision_select_layer is "-2" .text.'),
        ({"model": "m", "image_newline": 1}, "image_newline is 1; allowed: true or false"),
    ],
)
def test_a_base_that_is_none_is_told(tmp_path: Path, base: Any, problem: str) -> None:
    values = {FORMAT_KEY: 1, "r": 2, "lora_alpha": 4, "modules": [], "base": base, "base_fingerprint": ""}
    write_json(tmp_path / ADAPTER_FILE, values)
    write_json(tmp_path / PROCESSOR_FILE, {})
    with pytest.raises(UserError, match=rf"lora_config\.json: (base: )?{problem}"):
        read_adapter(tmp_path)


def test_a_name_that_no_file_system_can_hold_is_one_error(root: Path) -> None:
    adapter = root / "runs" / "ad"
    values = read_json(adapter / ADAPTER_FILE)
    values["base"]["model"] = "a" * 300
    values["base"].pop("relative")
    write_json(adapter / ADAPTER_FILE, values)
    with pytest.raises(UserError, match="the base model of the adapter .* was not found"):
        load_pretrained(adapter)
