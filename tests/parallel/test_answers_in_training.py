"""Answers in a training over tensor groups are those of one process, and one process writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paddlemix.trainer.callbacks.samples import SAMPLES_FILE
from tests.npu.cases import LORA_WITHOUT_DROPOUT
from tests.parallel.cluster import Cluster, Where
from tests.parallel.rank import Hook
from tests.tiny_world import World, reports

METRICS = ("loss", "eval_loss", "eval_exact_match", "eval_rouge_l")


def recipe(world: World, folder: Path, replicas: int = 1, **changes: Any) -> Path:
    """Two steps of four samples; the model answers after each of them, and in an evaluation of five samples."""
    values: dict[str, Any] = {**LORA_WITHOUT_DROPOUT, "learning_rate": 0.02, "adam_epsilon": 1e-4, "max_steps": 2}
    values |= {"per_device_train_batch_size": 4 // replicas, "max_new_tokens": 6, "sample_steps": 1}
    values |= {"evaluation_strategy": "steps", "eval_steps": 2, "eval_with_do_generation": True}
    return world.recipe(folder, **{**values, **changes})


def answers(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "out" / SAMPLES_FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def alone(cluster: Cluster, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    outcome = cluster.run(1, "tools.supervised_finetune", recipe(world, folder))
    assert outcome.ok, outcome.told()
    return folder


@pytest.mark.parametrize(("ranks", "where"), [(2, "cpu"), (4, "npu")])
def test_they_are_those_of_one_process(
    cluster: Cluster, world: World, alone: Path, tmp_path: Path, ranks: int, where: Where
) -> None:
    changes = {"tensor_parallel_degree": 2, "device": where}
    path = recipe(world, tmp_path, replicas=ranks // 2, **changes)
    outcome = cluster.run(ranks, "tools.supervised_finetune", path, where=where)
    assert outcome.ok, outcome.told()
    assert answers(tmp_path) == answers(alone)
    assert {line["answer"] for line in answers(alone)} != {""}
    for name in METRICS:
        found, wanted = reports(tmp_path / "out", name), reports(alone / "out", name)
        assert found == pytest.approx(wanted, rel=1e-5), name
        assert found, name


def lose_a_picture() -> None:
    """A hook: this process cannot read a record of the evaluation set."""
    from paddlemix.datasets.mixture import SampleDataset

    original = SampleDataset.sample

    def sample(self: SampleDataset, index: int) -> Any:
        if len(self) == 5 and index == 2:
            raise OSError("the disk does not answer")
        return original(self, index)

    SampleDataset.sample = sample  # type: ignore[method-assign]


def test_what_one_process_cannot_read_ends_all(cluster: Cluster, world: World, tmp_path: Path) -> None:
    """Not by the launcher: they agree before they compute, so that none waits for one that has failed."""
    path = recipe(world, tmp_path, tensor_parallel_degree=2, do_train=False, do_eval=True, sample_steps=None)
    hooks = [Hook(f"{__name__}:lose_a_picture", rank=1)]
    outcome = cluster.run(2, "tools.supervised_finetune", path, hooks=hooks, patience=60.0)
    assert all(status > 0 for status in outcome.statuses), outcome.told()
    assert "process 1 failed: the disk does not answer" in outcome.logs[0]
