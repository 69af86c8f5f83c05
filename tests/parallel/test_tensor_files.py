"""What processes that split a model write is what one process writes, and each reads back its part."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel.cluster import Circumstances, Cluster, Where
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
