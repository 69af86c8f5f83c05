"""Where processes on CPU wait for each other as long as it takes.

Gloo, which connects them, ends a collective in which another process is more than 30 seconds late, and offers no way to
change that.  One that downloads a model or writes a checkpoint is later.  So before a collective that may find the
others busy, processes meet at the store through which they found each other; it has no such limit.
Measured with paddle 3.3.1: 28 seconds pass, 33 end all processes with gloo's TIMEOUT.
"""

from __future__ import annotations

import itertools
import signal
import time
from typing import Protocol

import paddle
import paddle.distributed as dist

from paddlemix.device.settings_of_processes import PATIENCE_SECONDS
from paddlemix.errors import UserError

_POLL_SECONDS = 0.05
_numbers = itertools.count()


class Store(Protocol):
    """What is needed of paddle's store: numbers under names, shared by all processes."""

    def add(self, key: str, amount: int) -> int:
        """Adds to a number, which begins with 0, and returns it."""


def meet() -> None:
    """Returns when every process has come here; on accelerators, whose libraries wait long enough, at once.

    Takes a message to the store, some 40 ms: not for every step.

    Raises:
        UserError: not all processes came within `PATIENCE_SECONDS`.
    """
    if dist.is_initialized() and dist.get_world_size() > 1 and dist.get_backend() == "GLOO":
        # Every process makes the same calls in the same order, so the numbers agree.
        name = f"paddlemix/meeting/{next(_numbers)}"
        meet_at(paddle.base.core.create_or_get_global_tcp_store(), name, dist.get_world_size(), PATIENCE_SECONDS)


def meet_at(store: Store, name: str, processes: int, patience: float) -> None:
    """Returns when as many processes have come to the same place.

    Args:
        store: of all of them.
        name: of the place, used once.
        patience: seconds.

    Raises:
        UserError: they did not come.
    """
    begin = time.monotonic()
    arrived = _added(store, name, 1)
    while arrived < processes:
        if time.monotonic() - begin > patience:
            raise UserError(
                f"{processes - arrived} of {processes} processes did not come within {patience:.0f} seconds; look at "
                "the ends of all processes' logs"
            )
        time.sleep(_POLL_SECONDS)
        arrived = _added(store, name, 0)


def _added(store: Store, name: str, amount: int) -> int:
    """As `store.add`, which a signal would end by "TCP receive error: Interrupted system call": it comes afterwards."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        return store.add(name, amount)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
