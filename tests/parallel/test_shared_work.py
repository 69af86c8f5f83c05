"""What is kept between runs is made by one process, the others wait for it; pictures are checked once on a machine."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from tests.parallel.cluster import Cluster
from tests.tiny_world import World


def work(keys: list[str], cache: str) -> Counter[str]:
    """Run on every process: how much of each kind it did to prepare a run."""
    from paddlemix.config.load import load_config
    from paddlemix.datasets.image_check import ImageCheck
    from paddlemix.datasets.mixture import SampleDataset
    from paddlemix.datasets.records import record_file
    from paddlemix.network import fetch
    from paddlemix.trainer.recipe import run_recipe

    os.environ["PADDLEMIX_CACHE"] = cache
    done: Counter[str] = Counter()

    def counted(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            done[name] += 1
            return original(*arguments, **named)

        setattr(owner, name, call)

    for owner, name in ((record_file, "build_index"), (SampleDataset, "measure"), (ImageCheck, "check")):
        counted(owner, name)
    counted(fetch, "_download")
    run_recipe(load_config(None, keys))
    return done


def test_a_second_process_does_no_work_of_the_first(cluster: Cluster, world: World, tmp_path: Path) -> None:
    # The pictures of twelve records, nine of which have one; each file is looked at once.
    values = world.values(tmp_path / "out", mixtoken=True, max_steps=1, per_device_train_batch_size=1)
    keys = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    cache = str(tmp_path / "cache")
    outcome = cluster.call(2, f"{__name__}:work", keys=keys, cache=cache)
    assert outcome.ok, outcome.told()
    total = sum((Counter(result) for result in outcome.results), Counter[str]())
    assert total == {"build_index": 1, "measure": 12, "check": 9}
    assert "check" not in outcome.results[1]
    again = cluster.call(2, f"{__name__}:work", keys=[*keys, f"output_dir={tmp_path / 'again'}"], cache=cache)
    assert again.ok and again.results == [{"check": 9}, {}], again.told()
