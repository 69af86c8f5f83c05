"""Which process of a run does what, and where it is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

Stage = Literal["", "stage1", "stage2", "stage3"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The processes of a run, seen from one of them.

    Args:
        world_size, rank: of all processes.
        data_size, data_rank: of the processes that read different samples of a step.
        stage: what the processes of a sharding group share instead of holding it whole: "" nothing, "stage1" the
            optimiser's states, "stage2" gradients too, "stage3" weights too.
        sharding_group: paddle's group of the processes that share; None where nothing is shared.
        tensor_group: paddle's group of the processes that compute one model together, each with a part of its weights;
            None where each computes alone.  Its processes have neighbouring ranks.
    """

    world_size: int = 1
    rank: int = 0
    data_size: int = 1
    data_rank: int = 0
    stage: Stage = ""
    sharding_group: Any = None
    tensor_group: Any = None

    @property
    def several(self) -> bool:
        """Whether there is another process."""
        return self.world_size > 1

    @property
    def sharding_degree(self) -> int:
        """Processes that share one copy of what the stage shares; 1 where nothing is shared."""
        return 1 if self.sharding_group is None else int(self.sharding_group.nranks)

    @property
    def sharding_rank(self) -> int:
        """Place of this process in its sharding group; 0 where nothing is shared."""
        return 0 if self.sharding_group is None else int(self.sharding_group.rank)

    @property
    def tensor_degree(self) -> int:
        """Processes that compute one model together; 1 where each computes alone."""
        return 1 if self.tensor_group is None else int(self.tensor_group.nranks)

    @property
    def tensor_rank(self) -> int:
        """Place of this process in its tensor group; 0 where it computes alone."""
        return 0 if self.tensor_group is None else int(self.tensor_group.rank)

    @property
    def writers(self) -> int:
        """Processes 0 to N - 1 that write a checkpoint's files in turn: those whose shares make up one whole copy; all
        where each holds everything."""
        holders = self.sharding_degree * self.tensor_degree
        return holders if self.stage or self.tensor_degree > 1 else self.world_size

    @property
    def writes(self) -> bool:
        """Whether this process is one of the writers."""
        return self.rank < self.writers


ALONE = Layout()


def local_rank() -> int:
    """Number of this process on its machine, 0 when started alone."""
    # Source: paddle.distributed.launch, controllers/collective.py
    return int(os.environ.get("PADDLE_RANK_IN_NODE", os.environ.get("PADDLE_LOCAL_RANK", "0")))
