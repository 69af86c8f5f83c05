"""An evaluation by several processes is that of one, whatever their shares are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.cluster import Circumstances, Cluster
from tests.tiny_world import World, reports

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
    data = {
        "train": [{"data_files": str(world.data / "train.json")}],
        "eval": [{"data_files": str(folder / "eval.json")}],
    }
    values |= {"dataset": data, "max_new_tokens": 3, "adam_epsilon": 1e-4}
    values |= {"on_bad_sample": "skip", "max_bad_fraction": 1.0}
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def test_unequal_shares(cluster: Cluster, keys: list[str]) -> None:
    alone = cluster.call(1, f"{__name__}:evaluations", keys=keys)
    assert alone.ok, alone.told()
    for more, bound in (([], 1e-12), (["tensor_parallel_degree=2"], 1e-6)):
        outcome = cluster.call(2, f"{__name__}:evaluations", keys=[*keys, *more])
        assert outcome.ok, outcome.told()
        for found in outcome.results:
            for number, wanted in enumerate(alone.results[0]):
                for name in wanted.keys() - {"eval_runtime"}:
                    assert found[number][name] == pytest.approx(wanted[name], rel=bound), name
        assert "cut.png" in outcome.logs[0]  # though the other process had it


def trained(keys: list[str]) -> None:
    """Run on every process: a run whose weights are nearly all in slices under stage 3."""
    from paddlemix.config.load import load_config
    from paddlemix.parallel import deferred
    from paddlemix.trainer.recipe import run_recipe

    deferred.LARGE = 64
    run_recipe(load_config(None, keys))


def test_unequal_shares_of_sliced_weights(cluster: Cluster, keys: list[str], tmp_path: Path) -> None:
    """A pass gathers weights, so that a process without a batch has to make it too."""
    found = []
    for ranks, more in ((1, {}), (2, {"sharding": "stage3"})):
        values: dict[str, Any] = {"do_train": True, "max_steps": 1, "evaluation_strategy": "steps", "eval_steps": 1}
        values |= {"eval_with_do_generation": False, "device": "npu"}
        values |= {"per_device_train_batch_size": 2 // ranks, "output_dir": str(tmp_path / str(ranks)), **more}
        outcome = cluster.call(
            ranks,
            f"{__name__}:trained",
            Circumstances(where="npu"),
            keys=[*keys, *(f"{key}={json.dumps(value)}" for key, value in values.items())],
        )
        assert outcome.ok, outcome.told()
        found.append(reports(tmp_path / str(ranks), "eval_loss")[1])
    assert found[1] == pytest.approx(found[0], rel=2e-6)
