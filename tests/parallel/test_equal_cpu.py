"""Every case learns in several processes on the CPU what it learns in one."""

from __future__ import annotations

import pytest

from tests.parallel.cluster import Cluster
from tests.parallel.table import Layout, Table, check_equal
from tests.tiny_world import World

# Recomputed or accumulated, the numbers are those of the plain case.
SAME_AS = {"recompute": "full", "accumulation": "full"}
DATA_PARALLEL = (
    "full", "lora", "packed", "modality", "texts", "qlora", "recompute", "accumulation", "tower of 1.6", "evaluation",
)  # fmt: skip


@pytest.fixture(scope="module")
def table(cluster: Cluster, world: World, tmp_path_factory: pytest.TempPathFactory) -> Table:
    return Table(cluster, world, tmp_path_factory.mktemp("table"))


@pytest.mark.parametrize("case", DATA_PARALLEL)
def test_two_processes(table: Table, case: str) -> None:
    check_equal(table.trained(SAME_AS.get(case, case)), table.trained(case, Layout(2)))


@pytest.mark.parametrize("case", ["full", "lora"])
def test_two_processes_share_the_optimiser(table: Table, case: str) -> None:
    check_equal(table.trained(case), table.trained(case, Layout(2, "stage1")))


def test_four_processes(table: Table) -> None:
    check_equal(table.trained("full"), table.trained("full", Layout(4)))
