"""The stand-in NPU's collectives between processes: values, and that a mistake is an error that names both sides."""

from __future__ import annotations

import pytest

from tests.parallel.cluster import Circumstances, Cluster

PROBES = "tests.parallel.ccl_probes"
NPU = Circumstances(where="npu")


def test_every_collective(cluster: Cluster) -> None:
    outcome = cluster.call(3, f"{PROBES}:every_collective", NPU)
    assert outcome.ok, outcome.told()
    expected = {
        "all_reduce SUM": [6.0, 60.0],
        "all_reduce MAX": [3.0, 30.0],
        "all_reduce MIN": [1.0, 10.0],
        "all_reduce PROD": [6.0, 6000.0],
        **{
            f"all_reduce {dtype}": [6.0, 60.0]
            for dtype in ("int32", "int64", "float64", "float16", "bfloat16", "uint8")
        },
        "all_gather": [[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]],
        "broadcast": [2.0, 20.0],
        "objects": [{"rank": rank, "text": "x" * rank} for rank in range(3)],
    }
    for rank, result in enumerate(outcome.results):
        own = {
            "reduce": [6.0, 60.0] if rank == 1 else None,
            "reduce_scatter": [300.0 + 3 * rank],
            "sent": [float((rank - 1) % 3)] * 2,
            "group": [3.0] if rank else [0.0],
            "place": f"Place(npu:{rank})",
        }
        assert result == expected | own
    ran = outcome.collectives[1]
    assert ran["broadcast:float32"] == [1, 8] and ran["reduce_scatter:float32"] == [1, 4]
    assert ran["all_reduce:float16"] == [1, 4] and ran["send:float32"] == [1, 2_000_000]


def test_half_precision_is_summed_in_single(cluster: Cluster) -> None:
    outcome = cluster.call(3, f"{PROBES}:half_precision", NPU)
    assert outcome.results == [[2050.0]] * 3, outcome.told()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("another operation", "all_reduce #1 (sum, 3 x float32), but rank 1 is at broadcast #1 (3 x float32, root 0)"),
        ("another count", "all_reduce #1 (sum, 3 x float32), but rank 1 is at all_reduce #1 (sum, 4 x float32)"),
        ("one is gone", "all_reduce #2 (sum, 3 x float32), but rank 1 is gone"),
        ("int16", "broadcast of C_DataType 7, which the boards do not carry"),
    ],
)
def test_a_mistake_is_an_error_at_once(cluster: Cluster, kind: str, said: str) -> None:
    outcome = cluster.call(2, f"{PROBES}:different_calls", NPU, kind=kind)
    assert outcome.statuses[0] == 1 and f"npu double, rank 0 of 2: {said}" in outcome.logs[0], outcome.told()
    assert "the error code is : 3" in outcome.logs[0]


def test_a_late_rank_is_waited_for_no_longer_than_told(cluster: Cluster) -> None:
    how = Circumstances(where="npu", variables={"NPU_DOUBLE_CCL_TIMEOUT_S": "0.5"}, patience=0.0)
    outcome = cluster.call(2, f"{PROBES}:late", how)
    assert outcome.statuses == [1, -9] and "rank 1 did not come in time" in outcome.logs[0], outcome.told()
