"""What must hold between a run's keys and the number of its processes; known before any of them starts."""

from __future__ import annotations

from paddlemix.config.schema import RunConfig
from paddlemix.errors import UserError
from paddlemix.log import logger


def check_devices(config: RunConfig, processes: int, device: str) -> None:
    """Refuses a run whose processes cannot share it as it asks.

    Args:
        device: as paddle names it.

    Raises:
        UserError: `sharding_parallel_degree` does not divide their number, or the layout does not exist there.
    """
    # "stage2" and "stage2 offload"
    stage = config.sharding.partition(" ")[0]
    if not stage:
        return
    if processes == 1:
        logger.warning(
            'sharding "%s" has no effect in one process; start several with paddlemix launch, one for each card', stage
        )
        return
    key = "sharding_degree" if config.sharding_degree > config.sharding_parallel_degree else "sharding_parallel_degree"
    degree = getattr(config, key)  # -1 and 0 mean all processes
    if degree > 0 and processes % degree:
        allowed = ", ".join(str(number) for number in range(1, processes + 1) if processes % number == 0)
        raise UserError(
            f"{key} {degree} does not divide the {processes} processes of this run; allowed: {allowed}, or -1 for all"
        )
    if degree == 1:  # PaddleNLP switches it off
        logger.warning('sharding "%s" has no effect with %s 1: every process has everything', stage, key)
        return
    if stage != "stage1":
        _check_later_stages(config, processes, device, (key, degree))
    if config.offload_optim:
        raise UserError(
            f'offload_optim cannot be used with sharding "{stage}" in {processes} processes, which share the states '
            "already; set it to false"
        )


def _check_later_stages(config: RunConfig, processes: int, device: str, degree: tuple[str, int]) -> None:
    """What stages 2 and 3 need besides; `degree` is the key and its value."""
    if device.startswith("cpu"):
        raise UserError(
            f'sharding "{config.sharding}" needs accelerators: Paddle has no such collectives for CPU processes; use '
            '"stage1", or leave it out'
        )
    # Source: PaddleNLP 3.0.0b4, trainer.py, "main grad is not compatible with dp for now".
    if config.amp_master_grad and (config.bf16 or config.fp16) and 0 < degree[1] < processes:
        raise UserError(
            f'amp_master_grad true with sharding "{config.sharding}" needs all {processes} processes to share one '
            f'copy, but {degree[0]} is {degree[1]}; set {degree[0]} to -1, or use sharding "stage1"'
        )
