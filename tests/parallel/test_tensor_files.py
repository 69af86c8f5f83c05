"""What processes that split a model write is what one process writes, and each reads back its part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parallel.cluster import Circumstances, Cluster, Where
from tests.parallel.rank import Hook
from tests.tiny_world import World


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(("where", "dtype"), [("cpu", "float32"), ("cpu", "bfloat16"), ("npu", "float16")])
def test_weights_and_states_are_whole_in_a_checkpoint(
    cluster: Cluster, tmp_path: Path, where: Where, dtype: str
) -> None:
    target, how = "tests.parallel.tensor_files:write_and_read", Circumstances(where=where)
    outcome = cluster.call(2, target, how, folder=str(tmp_path), dtype=dtype)
    assert outcome.ok, outcome.told()
    assert files(tmp_path / "joint") == files(tmp_path / "alone-0")
    first, second = outcome.results
    assert first["writers"] == second["writers"] and set(first["writers"]) == {0, 1}
    assert len(first["held"]) > 20 and not any(first["held"] + second["held"])  # one at a time


def test_results_are_those_of_one_process(cluster: Cluster, world: World, tmp_path: Path) -> None:
    target = "tests.parallel.tensor_files:write_adapter"
    outcome = cluster.call(2, target, folder=str(tmp_path), model=str(world.model))
    assert outcome.ok, outcome.told()
    for name in ("", "-model"):
        assert files(tmp_path / f"joint{name}") == files(tmp_path / f"alone-0{name}")


def test_weights_that_have_drifted_apart_are_named(cluster: Cluster) -> None:
    outcome = cluster.call(2, "tests.parallel.tensor_files:drift")
    assert outcome.ok, outcome.told()
    assert outcome.results[0] == outcome.results[1]
    equal, frozen, trained = outcome.results[0]
    assert not equal and not frozen
    assert trained.startswith("the weight 'language_model.norm.weight' of process 1 is not that of process 0")


def part_the_norm(step: int) -> None:
    """A hook: the last norm of this process differs by a few bits from a step on."""
    from paddlemix.trainer.callbacks.seeding import SeedEachStep

    begin = SeedEachStep.on_step_begin

    def acted(callback: Any, arguments: Any, state: Any, control: Any, model: Any = None, **named: Any) -> None:
        if state.global_step + 1 == step:
            weight = model.model.language_model.norm.weight
            weight.set_value(weight * (1 + 2**-20))
        begin(callback, arguments, state, control, model=model, **named)

    SeedEachStep.on_step_begin = acted  # type: ignore[method-assign]


def test_a_run_whose_weights_have_parted_ends_and_saves_nothing_of_them(
    cluster: Cluster, world: World, tmp_path: Path
) -> None:
    keys = {"tensor_parallel_degree": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    hook = Hook(f"{__name__}:part_the_norm", rank=1, values={"step": 2})
    outcome = cluster.run(2, "tools.supervised_finetune", world.recipe(tmp_path, **keys), hooks=[hook])
    assert outcome.statuses == [2, 2], outcome.told()
    expected = (
        "checkpoint-2 was not saved: the weight 'language_model.norm.weight' of process 1 is not that of process 0"
    )
    assert expected in outcome.logs[0] + outcome.logs[1], outcome.told()
    assert [path.name for path in (tmp_path / "out").glob("*checkpoint*")] == ["checkpoint-1"]
