"""A run, its dry run and `check-data` prepare text and images by one processor, whatever decides it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from paddlemix.checkpoints.base_model import BaseSpec
from paddlemix.checkpoints.files.weight_files import write_safetensors
from paddlemix.checkpoints.load import load_base
from paddlemix.checkpoints.pretrained import parameter_entries
from paddlemix.config.schema import RunConfig
from paddlemix.dry_run import plan
from paddlemix.errors import UserError
from paddlemix.processors.llava import PROCESSOR_FILE, LlavaProcessor
from paddlemix.tools.common.check_plan import CheckOptions, make_plan
from paddlemix.trainer import recipe
from paddlemix.trainer.processes import begin_processes
from tests.tiny import TILE
from tests.tiny_world import CLIP_TOWER, LORA, World

PARTS = {"mm_vision_tower": str(CLIP_TOWER)}
ANYRES = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[56, 28], [28, 56]]}


def _projector(world: World, folder: Path) -> dict[str, Any]:
    base = load_base(BaseSpec(model=str(world.llama), tower=str(CLIP_TOWER)))
    names = {name for name, _ in base.model.named_parameters() if name.startswith("projector.")}
    write_safetensors(folder / "projector.safetensors", parameter_entries(base.model, names))
    return {**PARTS, "pretrain_mm_mlp_adapter": str(folder / "projector.safetensors")}


# of each field of BaseSpec, keys that set it, on a text-only model; None where no key of a run does
CASES: dict[str, Callable[[World, Path], dict[str, Any]] | None] = {
    "model": lambda world, folder: {"model_name_or_path": str(world.model)},
    "tower": lambda world, folder: PARTS,
    "mm_projector_type": lambda world, folder: {**PARTS, "mm_projector_type": "linear"},
    "mm_vision_select_layer": lambda world, folder: {**PARTS, "mm_vision_select_layer": -1},
    "mm_vision_select_feature": lambda world, folder: {**PARTS, "mm_vision_select_feature": "cls_patch"},
    "image_newline": lambda world, folder: {**PARTS, **ANYRES, "mm_patch_merge_type": "spatial_unpad"},
    "vision_image_size": lambda world, folder: {**PARTS, "vision_image_size": 2 * TILE},
    "projector_file": _projector,
    "inside": None,
    "quantize": lambda world, folder: {**PARTS, **LORA, "quantize_base": "int8"},
    "starts_projector": None,  # decides about weights alone
}
WHOLE: dict[str, dict[str, Any]] = {
    "own tower": {},
    "own tower, larger": {"vision_image_size": 2 * TILE},
    "own tower and another": {**PARTS, "mm_vision_select_feature": "cls_patch"},
    "aspect, grids, template": {**ANYRES, "mm_patch_merge_type": "spatial", "chat_template": "llava_v1"},
}


def processors(
    config: RunConfig, path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[LlavaProcessor, LlavaProcessor, LlavaProcessor]:
    """The processors of the run, of its dry run and of `check-data`."""
    seen: list[LlavaProcessor] = []
    original = plan.read_samples

    def read_samples(config: RunConfig, split: str, processor: LlavaProcessor, *more: Any, **named: Any) -> Any:
        seen.append(processor)
        return original(config, split, processor, *more, **named)

    monkeypatch.setattr(plan, "read_samples", read_samples)
    plan.plan_run(config)
    [checked] = {id(file.processor): file.processor for file in make_plan([str(path)], CheckOptions()).files}.values()
    assert checked is not None
    return recipe._prepare(config, "cpu", begin_processes(config, "cpu"), None).processor, seen[0], checked


def compare(world: World, folder: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> LlavaProcessor:
    data = {"train": [{"data_files": str(world.data / "captions.json")}]}
    values = {"dataset": data, "chat_template": "vicuna_v1", **changes}
    run, dry, checked = processors(world.config(folder / "out", **values), world.recipe(folder, **values), monkeypatch)
    assert run.to_dict() == dry.to_dict() == checked.to_dict()
    assert run.tokenizer.fingerprint == dry.tokenizer.fingerprint == checked.tokenizer.fingerprint
    return run


def test_every_field_of_the_base_has_a_case() -> None:
    assert CASES.keys() == {field.name for field in fields(BaseSpec)}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case is not None])
def test_a_text_model_with_a_tower(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    case = CASES[name]
    assert case is not None
    processor = compare(world, tmp_path, {"model_name_or_path": str(world.llama), **case(world, tmp_path)}, monkeypatch)
    assert processor.image_spec.tokens_per_tile == {"mm_vision_select_feature": 5, "vision_image_size": 16}.get(name, 4)


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    compare(world, tmp_path, WHOLE[name], monkeypatch)


def test_squeezed_pictures_stay_squeezed(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that resizes both sides does so for tiles of another size, too, instead of cutting the centre out."""
    model = tmp_path / "model"
    shutil.copytree(world.model, model)
    path = model / PROCESSOR_FILE
    size = {"height": TILE, "width": TILE}
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_aspect_ratio": "square", "size": size}))
    changes = {"model_name_or_path": str(model), "vision_image_size": 2 * TILE}
    spec = compare(world, tmp_path, changes, monkeypatch).image_spec
    assert spec.squash and spec.resized_side == spec.tile_size == 2 * TILE


def test_an_adapter_brings_its_own(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = {**LORA, "chat_template": "llava_v1", "image_aspect_ratio": "square", "max_steps": 1}
    recipe.run_recipe(world.config(tmp_path / "first", **first))
    going_on = {"lora_path": str(tmp_path / "first"), "chat_template": None}
    processor = compare(world, tmp_path / "second", going_on, monkeypatch)
    assert processor.template.name == "llava_v1" and processor.image_spec.aspect_mode == "square"


def test_an_adapter_for_another_tile_size_is_refused(world: World, tmp_path: Path) -> None:
    recipe.run_recipe(world.config(tmp_path / "first", **LORA, vision_image_size=2 * TILE, max_steps=1))
    going_on = {"lora_path": str(tmp_path / "first")}
    said = f"prepares tiles of {2 * TILE} pixels, but the tower .* reads {TILE}; set vision_image_size to {2 * TILE}"
    for use in (recipe.run_recipe, plan.plan_run):
        with pytest.raises(UserError, match=said):
            use(world.config(tmp_path / "second", **going_on))
    checked = make_plan([str(world.recipe(tmp_path / "checked", **going_on))], CheckOptions())
    assert f"set vision_image_size to {2 * TILE}" in checked.notes[0]


def test_what_a_run_refuses_is_told_by_the_check(world: World, tmp_path: Path) -> None:
    path = world.recipe(tmp_path, **ANYRES, mm_patch_merge_type="spatial_unpad")
    assert "needs a model with an image_newline vector" in make_plan([str(path)], CheckOptions()).notes[0]
