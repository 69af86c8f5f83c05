"""A process that another program has started several times does not begin a run of its own."""

from __future__ import annotations

import pytest

from paddlemix.errors import UserError
from paddlemix.launch.process_rules import check_starter

TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    ("environment", "program"),
    [
        (TORCHRUN, "torchrun"),
        ({"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "3"}, "mpirun"),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, "mpiexec"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "srun"),
    ],
)
def test_other_programs_processes_are_refused(environment: dict[str, str], program: str) -> None:
    with pytest.raises(UserError, match=f"{program} has started this command [248] times .*paddlemix launch"):
        check_starter(environment)
    check_starter({**environment, "PADDLE_TRAINERS_NUM": "2"})


@pytest.mark.parametrize(
    "environment",
    [{}, {**TORCHRUN, "WORLD_SIZE": "1"}, {"WORLD_SIZE": "8"}, {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}],
)
def test_a_process_that_is_alone_begins(environment: dict[str, str]) -> None:
    """A variable of that name may be anybody's; a job script of SLURM is one process of a job of several tasks."""
    check_starter(environment)
