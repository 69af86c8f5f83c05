"""Every case learns on several stand-in NPUs what one process learns, and the collectives of its layout ran."""

from __future__ import annotations

import pytest

from tests.npu.test_strict import MISSING
from tests.parallel.cluster import Cluster
from tests.parallel.table import ALONE, Layout, Table, Trained, check_equal
from tests.tiny_world import World

SHARED = ("full", "lora", "recompute", "packed", "evaluation", "bf16", "bf16 lora")
ONE_NPU = Layout(where="npu")


@pytest.fixture(scope="module")
def table(cluster: Cluster, world: World, tmp_path_factory: pytest.TempPathFactory) -> Table:
    return Table(cluster, world, tmp_path_factory.mktemp("table"))


def alone(table: Table, case: str) -> Trained:
    if "bf16" in case or "lora" in case:  # bfloat16 rounds elsewhere on a CPU; a large rate shows the CPU's own kernels
        return table.trained(case, ONE_NPU)
    return table.trained("full" if case == "recompute" else case, ALONE)


def busy(trained: Trained) -> set[str]:
    """The collectives that carried weights, gradients or states; those that only carry words are left out."""
    assert all(ran == trained.collectives[0] for ran in trained.collectives)  # every rank made the same calls
    return {name.split(":")[0] for name, (_, total) in trained.collectives[0].items() if total > 10_000}


# Gradients are summed for all, or for the one that updates the weight and then tells the others; weights that are
# sliced are gathered where they are used, and the small ones are summed.
CARRIED_BY = {
    "": {"all_reduce", "broadcast"},  # broadcast: the weights at the start
    "stage1": {"reduce", "broadcast"},
    "stage2": {"reduce", "broadcast"},
    "stage3": {"all_gather", "all_reduce"},
}


@pytest.mark.parametrize("case", ["full", "bf16"])
@pytest.mark.parametrize("sharding", ["", "stage1"])
def test_whole_weights_and_shared_states(table: Table, case: str, sharding: str) -> None:
    trained = table.trained(case, Layout(2, sharding, "npu"))
    check_equal(alone(table, case), trained)
    assert busy(trained) == CARRIED_BY[sharding]


@pytest.mark.parametrize("case", SHARED)
@pytest.mark.parametrize("sharding", ["stage2", "stage3"])
def test_shared_gradients_and_weights(table: Table, case: str, sharding: str) -> None:
    trained = table.trained(case, Layout(2, sharding, "npu"))
    check_equal(alone(table, case), trained)
    assert busy(trained) == CARRIED_BY[sharding]


@pytest.mark.parametrize("sharding", ["", "stage1", "stage2", "stage3"])
def test_four_npus(table: Table, sharding: str) -> None:
    trained = table.trained("full", Layout(4, sharding, "npu"))
    check_equal(alone(table, "full"), trained)
    assert busy(trained) == CARRIED_BY[sharding]


# Of the operators that sharding adds, those that the real plugin of October 2024 lacks: of words, and at the start.
TO_THE_HOST = {("stack", "uint8"), ("flatten", "bfloat16")}


@pytest.mark.parametrize("sharding", ["stage1", "stage2", "stage3"])
def test_operators_of_the_real_plugin_are_enough(table: Table, sharding: str) -> None:
    trained = table.trained("bf16 plain", Layout(2, sharding, "strict"))
    check_equal(table.trained("bf16 plain", Layout(2, "", "strict")), trained)
    assert {found for log in trained.logs for found in MISSING.findall(log)} <= TO_THE_HOST
