"""What the processes of a run tell each other.  With one process everything returns at once.

Every process has to make the same calls in the same order; one that makes a call alone waits for the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import paddle
import paddle.distributed as dist

from paddlemix.errors import OtherProcessError
from paddlemix.parallel.rendezvous import meet

T = TypeVar("T")


def process_count() -> int:
    """Processes that have joined the run; 1 before its process group begins."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_rank() -> int:
    """Number of this process among those that have joined the run; 0 before its process group begins."""
    return dist.get_rank() if dist.is_initialized() else 0


def gathered(values: Sequence[float]) -> np.ndarray:
    """float32 [processes, n]: some numbers of every process, read on the host.

    Args:
        values: n numbers, the same n everywhere; whole numbers are exact up to 2**24.
    """
    # float32, because accelerators lack sums of float64 and integers.
    own = paddle.to_tensor(list(values), dtype="float32")
    if process_count() == 1:
        return own.numpy()[None]
    return gathered_tensor(own).numpy()


def gathered_tensor(own: paddle.Tensor) -> paddle.Tensor:
    """[processes, ...]: a tensor of the same shape of every process, on the device and not waited for."""
    if process_count() == 1:
        return own.unsqueeze(0)
    parts: list[paddle.Tensor] = []
    dist.all_gather(parts, own)
    return paddle.stack(parts)


def gathered_bytes(own: np.ndarray, group: Any) -> list[np.ndarray]:
    """An array of bytes of the same length of every process of a group, by its rank there.

    Args:
        own: uint8 [n].
    """
    # Into one tensor: NPU cannot put several together of this type.
    held = paddle.empty([group.nranks * own.size], dtype="uint8")
    group.process_group.all_gather(paddle.to_tensor(own), held).wait()
    return np.split(held.numpy(), group.nranks)


def gathered_objects(value: Any) -> list[Any]:
    """A value of every process, by rank.  For small values: it is pickled between processes of the same run."""
    if process_count() == 1:
        return [value]
    meet()  # the others may be writing or downloading
    values: list[Any] = []
    dist.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """The first process's value, on every process."""
    return gathered_objects(value)[0]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """After this block either every process goes on or every process raises.

    The block itself must not wait for other processes: one that has failed would not come.

    Raises:
        OtherProcessError: the block failed elsewhere, with the first failed rank and its error.  Where it failed, the
            process's own error.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    agree(failure)


def agree(failure: Exception | None) -> None:
    """Raises on every process if one of them has failed; see `together`.

    Args:
        failure: of this process, None where all is well.
    """
    own = None if failure is None else f"{failure}" or type(failure).__name__
    reports = gathered_objects(own)
    failed = [rank for rank, report in enumerate(reports) if report is not None]
    if not failed:
        return
    first = failed[0]
    # What all of them find is said once.
    if failure is not None and (own_rank() == first or own != reports[first]):
        raise failure
    raise OtherProcessError(f"process {first} failed: {reports[first]}")


def decided_by_first(decide: Callable[[], T]) -> T:
    """What the first process decides, on every process; its error ends all of them.

    Args:
        decide: called on the first process alone; what it returns is pickled.
    """
    decision: T | None = None
    with together():
        if own_rank() == 0:
            decision = decide()
    return cast(T, from_first(decision))
