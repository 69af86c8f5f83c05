"""Run on every rank by `test_stand_in.py`: collectives as a program calls them, their results as lists."""

from __future__ import annotations

from typing import Any

import numpy as np


def _joined() -> tuple[Any, Any, int]:
    import paddle
    import paddle.distributed as dist

    dist.init_parallel_env()
    return paddle, dist, dist.get_rank()


def every_collective() -> dict[str, Any]:
    """Of rank r: parts [r + 1, 10 * (r + 1)] of float32, unless said otherwise."""
    paddle, dist, rank = _joined()
    size = dist.get_world_size()
    results: dict[str, Any] = {}

    def own(dtype: str = "float32") -> Any:
        return paddle.to_tensor([rank + 1, 10 * (rank + 1)], dtype=dtype)

    for name in ("SUM", "MAX", "MIN", "PROD"):
        tensor = own()
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, name))
        results[f"all_reduce {name}"] = tensor.tolist()
    for dtype in ("int32", "int64", "float64", "float16", "bfloat16", "uint8"):
        tensor = own(dtype)
        dist.all_reduce(tensor)
        results[f"all_reduce {dtype}"] = tensor.astype("float32").tolist()
    parts: list[Any] = []
    dist.all_gather(parts, own())
    results["all_gather"] = [part.tolist() for part in parts]
    tensor = own()
    dist.broadcast(tensor, src=1)
    results["broadcast"] = tensor.tolist()
    tensor = own()
    dist.reduce(tensor, dst=1)
    results["reduce"] = tensor.tolist() if rank == 1 else None
    share = paddle.zeros([1])
    whole = paddle.to_tensor([float(100 * rank + place) for place in range(size)])
    dist.reduce_scatter(share, whole)
    results["reduce_scatter"] = share.tolist()
    results |= {"sent": _ring(paddle, dist, rank, size), "objects": _objects(dist, rank)}
    return results | {"group": _in_a_group(paddle, dist, rank, size), "place": str(tensor.place)}


def _ring(paddle: Any, dist: Any, rank: int, size: int) -> list[float]:
    """Everybody sends to the next rank: its tensor, larger than what a socket holds."""
    received = paddle.zeros([500_000])
    sent = dist.isend(paddle.full([500_000], float(rank)), (rank + 1) % size)
    dist.recv(received, (rank - 1) % size)
    sent.wait()
    return [float(received.min()), float(received.max())]


def _objects(dist: Any, rank: int) -> list[Any]:
    objects: list[Any] = []
    dist.all_gather_object(objects, {"rank": rank, "text": "x" * rank})
    return objects


def _in_a_group(paddle: Any, dist: Any, rank: int, size: int) -> list[float] | None:
    """The sum over all ranks but the first."""
    group = dist.new_group(list(range(1, size)))
    tensor = paddle.to_tensor([float(rank)])
    if rank:
        dist.all_reduce(tensor, group=group)
    dist.all_reduce(paddle.ones([1]))  # the first rank, where the others meet, ends last
    return tensor.tolist()


def half_precision() -> list[float]:
    """2048 + 1 + 1 in float16: in pairs each 1 is lost, in float32 none."""
    paddle, dist, rank = _joined()
    tensor = paddle.to_tensor([2048.0 if rank == 0 else 1.0], dtype="float16")
    dist.all_reduce(tensor)
    return [float(tensor)]


def different_calls(kind: str) -> None:
    """Rank 0 and rank 1 do not do the same."""
    paddle, dist, rank = _joined()
    first, second = paddle.ones([3]), paddle.ones([4])
    if kind == "another operation":
        dist.all_reduce(first) if rank == 0 else dist.broadcast(first, 0)
    elif kind == "another count":
        dist.all_reduce(first if rank == 0 else second)
    elif kind == "one is gone":
        dist.all_reduce(first)
        if rank == 0:
            dist.all_reduce(first)
    else:
        dist.broadcast(paddle.to_tensor(np.ones(2, "int16")), 0)


def late() -> None:
    """Rank 1 never comes to what rank 0 waits for, but lives."""
    import time

    paddle, dist, rank = _joined()
    dist.all_reduce(paddle.ones([1]))
    if rank:
        time.sleep(60)
    dist.all_reduce(paddle.ones([1]))
