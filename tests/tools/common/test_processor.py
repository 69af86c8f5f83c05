"""The processor that a run's JSON leads to, with another checkpoint in place of its own."""

from __future__ import annotations

from pathlib import Path

from paddlemix.tools.common.processor import open_processor, processor_of_run
from paddlemix.trainer.run_model import declared_processor
from tests.tiny_world import CLIP_TOWER, World


def test_another_text_model_gets_the_tower_of_the_run(world: World, tmp_path: Path) -> None:
    """As a run that started from it would: with `mm_vision_select_feature` cls_patch a tile has one token more."""
    values = {"mm_vision_tower": str(CLIP_TOWER), "mm_vision_select_feature": "cls_patch"}
    found = processor_of_run(world.config(tmp_path / "out", **values), str(world.llama))
    own = declared_processor(world.config(tmp_path / "out", model_name_or_path=str(world.llama), **values))
    assert found.to_dict() == own.to_dict()
    assert found.image_spec.tokens_per_tile == 5


def test_another_whole_model_keeps_its_own_tower(world: World, tmp_path: Path) -> None:
    config = world.config(tmp_path / "out", model_name_or_path=str(tmp_path / "none"), image_aspect_ratio="square")
    found = processor_of_run(config, str(world.model))
    assert found.image_spec.aspect_mode == "square"
    assert found.tokenizer.fingerprint == open_processor(str(world.model)).tokenizer.fingerprint
