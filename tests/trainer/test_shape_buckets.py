"""Rows and tiles padded up to a multiple: fewer shapes, and the same losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.datasets.collate import collate
from paddlemix.sample import Row
from paddlemix.trainer.recipe import run_recipe
from tests.models.test_packed import SPECS, examples_of, losses_of, model_of
from tests.tiny_world import World

BUCKETS = {"pad_to_multiple_of": 32, "pad_tiles_to_multiple_of": 4}


def losses(world: World, folder: Path, **changes: Any) -> list[float]:
    run_recipe(world.config(folder, **changes))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("packed", [False, True])
def test_the_losses_and_gradients_of_a_batch(name: str, packed: bool) -> None:
    spec, model, examples = SPECS[name], model_of(name), examples_of(SPECS[name])
    rows = [Row(tuple(examples[:2])), Row(tuple(examples[2:]))] if packed else examples
    plain, gradients = losses_of(model, collate(rows, spec.tokens_per_tile))
    batch = collate(rows, spec.tokens_per_tile, **BUCKETS)  # type: ignore[arg-type]
    assert batch.input_ids.shape[1] % 32 == 0
    assert batch.pixel_values is not None and len(batch.pixel_values) % 4 == 0
    found, found_gradients = losses_of(model, batch)
    np.testing.assert_allclose(found, plain, rtol=0, atol=1e-5)
    assert found_gradients.keys() == gradients.keys()
    for weight, values in gradients.items():
        limit = 1e-5 * max(float(np.abs(values).max()), 1.0)
        np.testing.assert_allclose(found_gradients[weight], values, rtol=0, atol=limit, err_msg=weight)


@pytest.mark.parametrize("cached", [False, True])
def test_the_losses_of_a_run(world: World, tmp_path: Path, cached: bool) -> None:
    """With stored features too: pictures occur twice, so batches hold both kinds of tiles."""
    kept = {"cache_vision_features": cached, "vision_cache_dir": str(tmp_path / "features"), "vision_tower": "frozen"}
    plain = losses(world, tmp_path / "plain", max_steps=8, vision_tower="frozen")
    found = losses(world, tmp_path / "buckets", max_steps=8, **kept, **BUCKETS)
    assert len(plain) == 8
    np.testing.assert_allclose(found, plain, rtol=1e-5)
