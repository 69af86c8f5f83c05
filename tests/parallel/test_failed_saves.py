"""A checkpoint or result that one of several processes cannot write: all end alike, and nothing half stays."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from paddlemix.trainer.resuming.checkpoint_check import find_damage
from paddlemix.trainer.resuming.checkpoint_folders import list_checkpoints
from tests.parallel.cluster import Cluster, Outcome
from tests.parallel.rank import Hook
from tests.tiny_world import World

STAGE1 = {"sharding": "stage1", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
SPLIT = {**STAGE1, "sharding": "", "tensor_parallel_degree": 2}


def infinite_moment(step: int) -> None:
    """A hook: one of this process's own moments is infinite when a step's checkpoint is saved."""
    import paddle

    from paddlemix.parallel.shares import adamw_of
    from paddlemix.trainer import trainer as module

    save = module.save_checkpoint

    def spoilt(trainer: Any, metrics: Any) -> Path:
        if trainer.state.global_step == step:
            moments = adamw_of(trainer.optimizer)._accumulators["moment2"]
            paddle.assign(next(iter(moments.values())) + float("inf"), next(iter(moments.values())))
        return save(trainer, metrics)

    module.save_checkpoint = spoilt


def errors(outcome: Outcome) -> list[str]:
    """The error that each process ended with."""
    return [log.rpartition("error: ")[2].strip() for log in outcome.logs]


def run(cluster: Cluster, recipe: Path, hook: Hook, **how: Any) -> Outcome:
    return cluster.run(2, "tools.supervised_finetune", recipe, hooks=[hook], **how)


@pytest.mark.parametrize("layout", [{"sharding": ""}, STAGE1, SPLIT], ids=["data", "stage1", "tensor"])
def test_a_full_disk_of_another_process(cluster: Cluster, world: World, tmp_path: Path, layout: dict[str, Any]) -> None:
    """Process 1 writes the optimiser's file, and process 0 the weights."""
    limit = Hook("tests.parallel.hooks:file_limit", 1, {"largest": 200_000})
    outcome = run(cluster, world.recipe(tmp_path, **{**STAGE1, **layout}), limit)
    assert outcome.statuses == [2, 2], outcome.told()
    first, second = errors(outcome)
    assert first == second
    assert (
        first.startswith("checkpoint-2 was not saved: process 1: cannot write '") and "optimizer.safetensors" in first
    )
    assert not list((tmp_path / "out").glob("*checkpoint*"))  # hidden ones too


@pytest.mark.parametrize("layout", [STAGE1, SPLIT], ids=["stage1", "tensor"])
def test_a_state_that_is_no_number_ends_all_alike(
    cluster: Cluster, world: World, tmp_path: Path, layout: dict[str, Any]
) -> None:
    outcome = run(cluster, world.recipe(tmp_path, **layout), Hook(f"{__name__}:infinite_moment", 1, {"step": 4}))
    assert outcome.statuses == [2, 2], outcome.told()
    first, second = errors(outcome)
    assert first == second
    assert first.startswith("checkpoint-4 was not saved: '") and "|moment2' holds infinity after step 4" in first
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    assert find_damage(tmp_path / "out" / "checkpoint-2") is None
    assert not list((tmp_path / "out").glob(".checkpoint*"))


def test_a_process_that_is_killed_while_it_writes(cluster: Cluster, world: World, tmp_path: Path) -> None:
    moment = {"touch": "sync */.checkpoint-4.*/optimizer.safetensors", "signal": int(signal.SIGKILL)}
    outcome = run(
        cluster, world.recipe(tmp_path, **STAGE1), Hook("tests.parallel.hooks:at_touch", 1, moment), patience=0.0
    )
    assert outcome.statuses[1] == -signal.SIGKILL and outcome.statuses[0] != 0, outcome.told()
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    assert find_damage(tmp_path / "out" / "checkpoint-2") is None


def test_a_result_that_cannot_be_written(cluster: Cluster, world: World, tmp_path: Path) -> None:
    values = {**STAGE1, "save_strategy": "no", "max_steps": 1}
    limit = Hook("tests.parallel.hooks:file_limit", 0, {"largest": 200_000})
    outcome = run(cluster, world.recipe(tmp_path, **values), limit)
    assert outcome.statuses == [2, 2], outcome.told()
    first, second = errors(outcome)
    assert first == second and first.startswith("the result was not saved: process 0: cannot write '")
    assert not (tmp_path / "out" / "config.json").exists() and not list((tmp_path / "out").glob(".result*"))
