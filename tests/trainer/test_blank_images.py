"""Text alone gets a blank image where tower or projector trains, and nothing is computed where neither does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import paddle
import pytest

from paddlemix.models.vision import VisionTower
from paddlemix.trainer.recipe import run_recipe
from paddlemix.trainer.trainable import trains_visual_parts
from tests.tiny_models import tiny_llava, tiny_model
from tests.tiny_world import LORA, World


@pytest.mark.parametrize("trained", ["vision_tower", "projector", "image_newline", "language_model"])
def test_what_only_an_image_reaches(trained: str) -> None:
    model = tiny_model(tiny_llava(image_newline=True))
    for name, weight in model.named_parameters():
        weight.stop_gradient = not name.startswith(trained)
    assert trains_visual_parts(model) == (trained != "language_model")


@pytest.mark.parametrize(
    ("values", "blanks"),
    [
        ({}, 3 * 2),  # steps x micro-batches
        ({**LORA, "projector": "frozen", "vision_tower": "lora"}, 3 * 2),
        ({**LORA, "projector": "frozen"}, 0),
        ({"cache_vision_features": True, "mixtoken": True, "max_length": 80}, 3 * 2),
    ],
    ids=["full", "adapters in the tower", "adapters", "kept features"],
)
def test_tiles_that_the_tower_computes_for_text(
    values: dict[str, Any], blanks: int, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = json.loads((world.data / "train.json").read_text(encoding="utf-8"))
    path = tmp_path / "text.json"
    path.write_text(json.dumps([record for record in records if "image" not in record]), encoding="utf-8")
    seen: list[tuple[bool, int]] = []
    forward = VisionTower.forward

    def counted(tower: VisionTower, pixels: paddle.Tensor) -> paddle.Tensor:
        assert not pixels.any()
        seen.append((tower.training, len(pixels)))
        return forward(tower, pixels)

    monkeypatch.setattr(VisionTower, "forward", counted)
    data = {"train": [{"data_files": str(path)}], "eval": [{"data_files": str(path)}]}
    config = world.config(
        tmp_path / "out",
        dataset=data,
        max_steps=3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        evaluation_strategy="steps",
        eval_steps=3,
        vision_cache_dir=str(tmp_path / "features"),
        **values,
    )
    run_recipe(config)
    assert seen == [(True, 1)] * blanks  # and none in the evaluation
