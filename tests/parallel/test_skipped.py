"""What several processes leave out is in one file, once each, also after a stop."""

from __future__ import annotations

import json
from pathlib import Path

from tests.parallel.cluster import Cluster
from tests.tiny_world import World


def test_samples_left_out_by_any_process(cluster: Cluster, world: World, tmp_path: Path) -> None:
    records = json.loads((world.data / "train.json").read_text(encoding="utf-8"))
    cut = tmp_path / "cut.png"
    cut.write_bytes(world.picture.read_bytes()[:200])  # its header is whole
    bad = [0, 1, 2, 4, 5, 6]
    for number in bad:
        records[number]["image"] = str(cut)
    data = tmp_path / "train.json"
    data.write_text(json.dumps(records), encoding="utf-8")
    for steps in (2, 5):  # an epoch has three
        values = {"on_bad_sample": "skip", "max_bad_fraction": 0.5, "save_strategy": "steps", "save_steps": 2}
        values |= {"dataloader_num_workers": 1}
        recipe = world.recipe(
            tmp_path / "run", dataset={"train": [{"data_files": str(data)}]}, max_steps=steps, **values
        )
        outcome = cluster.run(2, "tools.supervised_finetune", recipe)
        assert outcome.ok, outcome.told()
    assert f"{len(bad)} samples were left out" in outcome.logs[0]
    lines = (tmp_path / "run" / "out" / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    assert sorted(json.loads(line)["index"] for line in lines) == bad
    assert [path.name for path in (tmp_path / "run" / "out").glob("skipped*")] == ["skipped.jsonl"]
