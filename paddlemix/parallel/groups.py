"""The processes that answer with one model together: how they find each other and make their groups.

Those of a training are made with its `TrainingArguments`, see `trainer/processes.py`.
"""

from __future__ import annotations

import contextlib
import io
import sys

import paddle.distributed as dist

from paddlemix.parallel.layout import Layout


def begin_tensor_groups(degree: int) -> Layout:
    """Joins the processes of the run; returns when all have come.  The device has been selected before.

    Args:
        degree: processes of each tensor group, >= 2; divides the number of processes.

    Returns:
        Which process this is: of neighbouring ranks each `degree` compute one model, and each such group is one that
        reads data of its own.
    """
    _join_quietly()
    rank, size = dist.get_rank(), dist.get_world_size()
    own = dist.get_group(0)
    if degree < size:
        # Every process takes part in making every group, one after the other: gloo loses connections that are made at
        # the same time.
        for first in range(0, size, degree):
            ranks = list(range(first, first + degree))
            group = dist.new_group(ranks)
            own = group if rank in ranks else own
            dist.barrier()
    return Layout(
        world_size=size,
        rank=rank,
        data_size=size // degree,
        data_rank=rank // degree,
        tensor_group=own,
    )


def _join_quietly() -> None:
    """Without the list of the flags that we have set, which would be the first thing that a user sees in a chat."""
    notices = io.StringIO()
    try:
        with contextlib.redirect_stderr(notices):
            dist.init_parallel_env()
    finally:
        rest = [line for line in notices.getvalue().splitlines() if not line.startswith(("FLAGS(", "======"))]
        sys.stderr.write("".join(f"{line}\n" for line in rest))
