"""Runs with every kind of adapter from the recipe: resumed bit for bit, gone on with, merged by the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.errors import UserError
from paddlemix.tools import merge_lora_params
from paddlemix.trainer.recipe import run_recipe
from tests.tiny_world import LORA, MAX_GAP, World, weights

KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": True, "lora_plus_scale": 4.0},
    "dora": {"use_dora": True},
    "pissa": {"pissa": True},
    "tower": {"vision_tower": "lora", "vision_lora_rank": 2, "vision_lora_alpha": 3, "lora_bias": "lora_only"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_with_the_same_bits_and_merges(world: World, tmp_path: Path, kind: str) -> None:
    keys = {**LORA, **KINDS[kind], "learning_rate": 0.02}
    run_recipe(world.config(tmp_path / "whole", **keys, save_strategy="steps", save_steps=2))
    middle = str(tmp_path / "whole" / "checkpoint-2")
    run_recipe(
        world.config(tmp_path / "parts", **keys, save_strategy="steps", save_steps=2, resume_from_checkpoint=middle)
    )
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert [name for name in whole if whole[name].tobytes() != parts[name].tobytes()] == []
    adapter, merged = str(tmp_path / "whole"), str(tmp_path / "merged")
    assert merge_lora_params.main(["--lora_path", adapter, "--merge_model_path", merged]) in (0, None)
    assert not [name for name in weights(tmp_path / "merged") if "lora" in name]


def test_going_on_keeps_the_kind(world: World, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run_recipe(world.config(first, **LORA, **KINDS["pissa"]))
    run_recipe(world.config(second, lora_path=str(first), learning_rate=0.02))
    before, after = weights(first), weights(second)
    assert before.keys() == after.keys()
    starts = [name for name in before if name.endswith("_start")]
    assert starts and all(before[name].tobytes() == after[name].tobytes() for name in starts)
    moved = max(np.abs(before[name] - after[name]).max() for name in before if name.endswith("lora_B"))
    assert moved > MAX_GAP
    with pytest.raises(UserError, match="use_dora true contradicts the adapter .*first, which has false"):
        run_recipe(world.config(tmp_path / "third", lora_path=str(first), use_dora=True))
