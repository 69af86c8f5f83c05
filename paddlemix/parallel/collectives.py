"""What the processes of a run tell each other.  With one process everything returns at once.

Every process has to make the same calls in the same order; one that makes a call alone waits for the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist

from paddlemix.errors import UserError


def process_count() -> int:
    """Processes that have joined the run; 1 before its process group begins."""
    return dist.get_world_size() if dist.is_initialized() else 1


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


def gathered_objects(value: Any) -> list[Any]:
    """A value of every process, by rank.  For small values: it is pickled between processes of the same run."""
    if process_count() == 1:
        return [value]
    values: list[Any] = []
    dist.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """The first process's value, on every process."""
    return gathered_objects(value)[0]


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if process_count() > 1:
        gathered([0.0])


@contextlib.contextmanager
def together() -> Iterator[None]:
    """After this block either every process goes on or every process raises.

    The block itself must not wait for other processes: one that has failed would not come.

    Raises:
        UserError: the block failed elsewhere, with the first failed rank and its error; here, its own error.
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
    reports = gathered_objects(None if failure is None else f"{failure}" or type(failure).__name__)
    if failure is not None:
        raise failure
    for rank, report in enumerate(reports):
        if report is not None:
            raise UserError(f"process {rank} failed: {report}")
