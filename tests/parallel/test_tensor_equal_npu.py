"""Four stand-in NPUs, two for each replica of the model, learn what one process learns, whatever the replicas share."""

from __future__ import annotations

import pytest

from tests.npu.test_strict import MISSING
from tests.parallel.cluster import Cluster
from tests.parallel.curves import gaps
from tests.parallel.table import Layout, Table, Trained, check_equal
from tests.parallel.test_equal_npu import ONE_NPU, TO_THE_HOST
from tests.tiny_world import World


@pytest.fixture(scope="module")
def table(cluster: Cluster, uneven_world: World, tmp_path_factory: pytest.TempPathFactory) -> Table:
    return Table(cluster, uneven_world, tmp_path_factory.mktemp("table"))


def replicas(sharding: str) -> Layout:
    """Two replicas of two processes each."""
    return Layout(4, sharding, "npu", tensor=2)


def carried_by(trained: Trained) -> set[str]:
    """The collectives that carried gradients and weights, by any process; whole weights are gathered for a file."""
    ran = {name.split(":")[0] for own in trained.collectives for name, (_, total) in own.items() if total > 10_000}
    return ran - {"all_gather"}


# Inside of the layers outputs are added up in every layout.
_SHARED = {"all_reduce", "reduce", "broadcast"}


@pytest.mark.parametrize(
    ("case", "sharding", "carried"),
    [
        ("evaluation", "", {"all_reduce"}),  # five samples, so that one replica has fewer batches
        ("full", "stage1", _SHARED),
        ("full", "stage2", _SHARED),
        ("lora at a usual rate", "stage2", _SHARED),
    ],
)
def test_float32(table: Table, case: str, sharding: str, carried: set[str]) -> None:
    trained = table.trained(case, replicas(sharding))
    check_equal(table.trained(case), trained)
    assert carried_by(trained) == carried


def test_kept_features_of_weights_in_bfloat16(table: Table) -> None:
    """Without autocast nothing casts what the first process has told the other one."""
    case = "kept features in bfloat16"
    apart = gaps(table.trained(case, ONE_NPU).learned, table.trained(case, Layout(2, "", "npu", tensor=2)).learned)
    assert apart.loss < 2e-2, apart


def test_bfloat16(table: Table) -> None:
    """A sum over two processes rounds once more than the product of one: by less than bfloat16 is off float32, for a
    weight by one step of its type.  What the replicas share changes nothing."""
    trained, alone = table.trained("bf16", replicas("")), table.trained("bf16", ONE_NPU)
    apart, from_float32 = gaps(alone.learned, trained.learned), gaps(alone.learned, table.trained("evaluation").learned)
    assert apart.loss < min(1e-2, from_float32.loss) and apart.weight <= 2**-8, (apart, from_float32)
    assert apart.norm < 0.01 * max(alone.learned.norms.values()), apart
    for sharding in ("stage1", "stage2"):
        check_equal(trained, table.trained("bf16", replicas(sharding)))


def test_operators_of_the_real_plugin_are_enough(table: Table) -> None:
    trained = table.trained("bf16 plain lora", Layout(4, "stage2", "strict", tensor=2))
    start_values = ("uniform", "bfloat16")  # of an adapter, drawn once
    assert {found for log in trained.logs for found in MISSING.findall(log)} <= TO_THE_HOST | {start_values}
