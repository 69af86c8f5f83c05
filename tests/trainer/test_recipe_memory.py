"""The memory that the recipe book says is what `--dry-run` reckons for the published models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import paddlemix.config
from paddlemix.config.load import load_config
from paddlemix.dry_run.plan import plan_run
from tests.config.test_family_recipes import OF_FAMILIES
from tests.config.test_recipes import table_rows
from tests.conftest import ROOT
from tests.tiny import draw_picture

RECIPES = Path(paddlemix.config.__file__).parent / "llava"
# Folder of recipes -> what stands for the result of its first stage: keys of the command line.
FIRST_STAGES = {
    "internlm": {"model_name_or_path": "xtuner/llava-internlm-7b"},
    "internlm2": {"model_name_or_path": "xtuner/llava-internlm2-7b"},
    "llama3": {"model_name_or_path": "xtuner/llava-llama-3-8b"},
}


def stand_in(name: str) -> dict[str, object]:
    """Keys that replace a first stage which was not run here."""
    if not name.startswith("internvl/"):
        return FIRST_STAGES[name.split("/")[0]]
    first = load_config(RECIPES / f"internvl/pretrain_{name.removesuffix('.json').split('_')[-1]}.json")
    keys = ("model_name_or_path", "mm_vision_tower", "vision_image_size", "mm_vision_select_layer", "mm_projector_type")
    return {key: getattr(first, key) for key in keys}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough records for a step, of one picture."""
    directory = tmp_path_factory.mktemp("data")
    draw_picture(640, 480, 1).save(directory / "a.png")
    record = {"image": "a.png", "conversations": [["<image>\nWhat?", "A cat."]]}
    (directory / "train.json").write_text(json.dumps([record] * 300), encoding="utf-8")
    return directory


@pytest.mark.parametrize("name", OF_FAMILIES)
def test_the_memory_of_the_recipe_book(name: str, data: Path) -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (said,) = [int(cells[3]) for cells in table_rows(page) if cells[0] == f"`{name}`"]
    values = {
        "dataset": {"train": [{"data_files": str(data / "train.json")}]},
        "image_root": str(data),
        "device": "gpu",
    }
    if load_config(RECIPES / name).model_name_or_path.startswith("./"):
        values |= stand_in(name)
    plan = plan_run(load_config(RECIPES / name, [f"{key}={json.dumps(item)}" for key, item in values.items()]), 8)
    assert plan.memory.total / 1024**3 == pytest.approx(said, rel=0.05, abs=1)
