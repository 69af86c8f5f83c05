"""An evaluation by several processes is that of one, whatever their shares are."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.parallel.cluster import Cluster
from tests.tiny_world import World

LIMITS = (-1, 1)  # of batches; there are three, and with the limit one process has none


def evaluations(keys: list[str]) -> list[dict[str, float]]:
    """Run on every process: the metrics of one evaluation for each limit."""
    from paddlemix.config.load import load_config
    from paddlemix.trainer.recipe import run_recipe

    return [run_recipe(load_config(None, [*keys, f"max_evaluate_steps={limit}"])) for limit in LIMITS]


@pytest.fixture(scope="module")
def keys(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """An evaluation of five samples, the second of them bad, in batches of two."""
    folder = tmp_path_factory.mktemp("evaluation")
    records = json.loads((world.data / "eval.json").read_text(encoding="utf-8"))
    (folder / "cut.png").write_bytes(world.picture.read_bytes()[:200])  # its header is whole
    records[2]["image"] = str(folder / "cut.png")
    (folder / "eval.json").write_text(json.dumps(records), encoding="utf-8")
    values: dict[str, Any] = world.values(folder / "out", do_train=False, do_eval=True, eval_with_do_generation=True)
    values |= {"dataset": {"eval": [{"data_files": str(folder / "eval.json")}]}, "max_new_tokens": 3}
    values |= {"on_bad_sample": "skip", "max_bad_fraction": 1.0}
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def test_unequal_shares(cluster: Cluster, keys: list[str]) -> None:
    alone = cluster.call(1, f"{__name__}:evaluations", keys=keys)
    assert alone.ok, alone.told()
    outcome = cluster.call(2, f"{__name__}:evaluations", keys=keys)
    assert outcome.ok, outcome.told()
    for found in outcome.results:
        for number, wanted in enumerate(alone.results[0]):
            for name in wanted.keys() - {"eval_runtime"}:
                assert found[number][name] == pytest.approx(wanted[name], rel=1e-12), name
    assert "cut.png" in outcome.logs[0]  # though the other process had it
