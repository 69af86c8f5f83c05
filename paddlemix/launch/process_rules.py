"""What must hold between a run's keys and the number of its processes; known before any of them starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from paddlemix.config.schema import RunConfig
from paddlemix.config.sharing_rules import sharding_degree_key
from paddlemix.errors import UserError
from paddlemix.log import logger

# How other programs tell a process that they have started it several times: all variables are set, the first counts.
# Sources: torchrun's page of torch.distributed.elastic; Open MPI's mpirun(1); MPICH's Hydra; SLURM's srun(1).
_STARTERS = {
    "torchrun": ("WORLD_SIZE", "LOCAL_RANK", "RANK"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE",),
    "mpiexec": ("PMI_SIZE", "PMI_RANK"),
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
}


def check_starter(environment: Mapping[str, str]) -> None:
    """Refuses a process that is one of several, where the others would each begin a run of their own.

    Args:
        environment: of this process.

    Raises:
        UserError: a program that is not Paddle's or our launcher has started it several times.
    """
    if "PADDLE_TRAINERS_NUM" in environment:  # started by one of these, perhaps as the only process
        return
    if (told := how_often_started(environment)) is not None:
        raise UserError(
            f"{told.how}, but its processes do not find each other that way: each would train alone. Start paddlemix "
            "launch CONFIG once on each machine, with --nproc or --devices for its processes; or, if a run of one "
            f"process is meant, unset {told.variable}"
        )


@dataclass(frozen=True)
class Started:
    """A program that has started a command several times.

    Args:
        how: program and number, in words.
        variable: that says the number.
    """

    how: str
    variable: str


def how_often_started(environment: Mapping[str, str]) -> Started | None:
    """Which program of others has started this process as one of several; None where it is the only one.

    Args:
        environment: of this process.
    """
    for program, (size, *others) in _STARTERS.items():
        count = environment.get(size, "")
        if count.isdigit() and int(count) > 1 and all(name in environment for name in others):
            return Started(f"{program} has started this command {count} times ({size}={count})", size)
    return None


def check_devices(config: RunConfig, processes: int, device: str) -> None:
    """Refuses a run whose processes cannot share it as it asks.

    Args:
        device: as paddle names it.

    Raises:
        UserError: a degree does not divide their number, or the layout does not exist there.
    """
    tensor = max(config.tensor_parallel_degree, 1)
    _check_tensor_degree(tensor, processes)
    # "stage2" and "stage2 offload"
    stage = config.sharding.partition(" ")[0]
    key = sharding_degree_key(config)
    degree = getattr(config, key)  # -1 and 0 mean all processes
    if not stage:
        if degree > 1:
            logger.warning("%s %d has no effect without sharding: every process has everything", key, degree)
        return
    replicas = processes // tensor  # of the model, which are what processes can share
    if processes == 1:
        logger.warning(
            'sharding "%s" has no effect in one process; start several with paddlemix launch, one for each card', stage
        )
        return
    if degree > 0 and replicas % degree:
        of = f"{processes} processes" if tensor == 1 else f"{replicas} models of tensor_parallel_degree {tensor}"
        raise UserError(
            f"{key} {degree} does not divide the {of} of this run; allowed: {_divisors(replicas)}, or -1 for all"
        )
    if replicas == 1:
        logger.warning(
            'sharding "%s" has no effect: tensor_parallel_degree %d takes all processes for one model', stage, tensor
        )
        return
    if degree == 1:  # PaddleNLP switches it off
        logger.warning('sharding "%s" has no effect with %s 1: every process has everything', stage, key)
        return
    if stage != "stage1":
        _check_later_stages(config, replicas, device, (key, degree))
    if config.offload_optim:
        raise UserError(
            f'offload_optim cannot be used with sharding "{stage}" in {processes} processes, which share the states '
            "already; set it to false"
        )


def _check_tensor_degree(degree: int, processes: int) -> None:
    if processes % degree == 0:
        return
    raise UserError(
        f"tensor_parallel_degree {degree} does not divide the {processes} process{'es' if processes > 1 else ''} of "
        f"this run; start {degree} processes or a multiple (paddlemix launch, one for each card), or set "
        f"tensor_parallel_degree to one of: {_divisors(processes)}"
    )


def _divisors(number: int) -> str:
    return ", ".join(str(part) for part in range(1, number + 1) if number % part == 0)


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
            f'amp_master_grad true with sharding "{config.sharding}" needs all {processes} replicas to share one '
            f'copy, but {degree[0]} is {degree[1]}; set {degree[0]} to -1, or use sharding "stage1"'
        )
