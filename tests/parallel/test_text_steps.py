"""Steps of text alone, mixed and half filled ones: several processes learn what one does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parallel.cluster import Cluster
from tests.parallel.curves import gaps, losses_and_weights
from tests.tiny_world import LORA, World


@pytest.mark.parametrize(
    "changes",
    [{"vision_tower": "full"}, {**LORA, "lora_dropout": 0.0, "cache_vision_features": True}],
    ids=["everything trains", "adapters over kept features"],
)
def test_steps_of_one_modality(cluster: Cluster, world: World, tmp_path: Path, changes: dict[str, Any]) -> None:
    records = json.loads((world.data / "train.json").read_text(encoding="utf-8"))
    texts, images = ([item for item in records if ("image" in item) == wanted] for wanted in (False, True))
    path = tmp_path / "half.json"
    # 15 samples: a step of texts, one of images, and two of what is left, the last of which is filled
    path.write_text(json.dumps([*images[:7], *texts, *texts, *texts[:2]]), encoding="utf-8")
    values = {
        "dataset": {"train": [{"data_files": str(path)}]},
        "group_by_modality_length": True,
        "gradient_accumulation_steps": 2,
        "max_steps": 5,
        "adam_epsilon": 1e-4,
        **changes,
    }
    learned, kept = [], []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        recipe = world.recipe(
            folder, per_device_train_batch_size=2 // ranks, vision_cache_dir=str(folder / "features"), **values
        )
        outcome = cluster.run(ranks, "tools.supervised_finetune", recipe)
        assert outcome.ok, outcome.told()
        kept.append({path.name: np.load(path) for path in folder.rglob("*.npy")})
        learned.append(losses_and_weights(folder / "out"))
    apart = gaps(*learned)
    assert max(apart.loss, apart.weight) < 1e-5, apart
    # Both processes wrote features at the same time, of some pictures both.
    assert kept[0].keys() == kept[1].keys() and bool(kept[0]) == ("cache_vision_features" in changes)
    for name, features in kept[0].items():
        np.testing.assert_allclose(kept[1][name], features, atol=1e-6)
