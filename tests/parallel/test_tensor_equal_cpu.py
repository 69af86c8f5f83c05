"""Two processes on the CPU that compute one model together learn what one process learns."""

from __future__ import annotations

import pytest

from tests.parallel.cluster import Cluster
from tests.parallel.table import Layout, Table, check_equal
from tests.tiny_world import World

# Random numbers are drawn as by one process; "evaluation" is full fine-tuning, evaluated on the way.
CASES = ("random lora", "packed, all kinds of savings", "tower of 1.6", "evaluation")


@pytest.fixture(scope="module")
def table(cluster: Cluster, world: World, tmp_path_factory: pytest.TempPathFactory) -> Table:
    return Table(cluster, world, tmp_path_factory.mktemp("table"))


@pytest.mark.parametrize("case", CASES)
def test_two_processes(table: Table, case: str) -> None:
    check_equal(table.trained("packed" if "packed" in case else case), table.trained(case, Layout(2, tensor=2)))


def test_two_models_of_two_processes(table: Table) -> None:
    check_equal(table.trained("full"), table.trained("full", Layout(4, tensor=2)))
