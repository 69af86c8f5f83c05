"""What must hold between a run's keys and the number of its processes; known before any of them starts."""

from __future__ import annotations

from paddlemix.config.schema import RunConfig
from paddlemix.errors import UserError
from paddlemix.log import logger


def check_devices(config: RunConfig, processes: int) -> None:
    """Refuses a run whose processes cannot be split as it asks.

    Raises:
        UserError: `sharding_parallel_degree` does not divide their number.
    """
    if not config.sharding:
        return
    if processes == 1:
        logger.warning(
            'sharding "%s" has no effect in one process; start several with paddlemix launch',
            config.sharding,
        )
        return
    # Two names of one key; -1 and 0 mean all processes.
    degree = max(config.sharding_parallel_degree, config.sharding_degree)
    if degree > 0 and processes % degree:
        allowed = ", ".join(str(number) for number in range(1, processes + 1) if processes % number == 0)
        raise UserError(
            f"sharding_parallel_degree {degree} does not divide the {processes} processes of this run; allowed: "
            f"{allowed}, or -1 for all"
        )
