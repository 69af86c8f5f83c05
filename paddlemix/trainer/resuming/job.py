"""Whether this start of a run is one by the user, or the restart of a job: by its launcher, or by SLURM.

A launcher that starts its workers again is still the same process, their parent; SLURM counts the restarts of a job.
No other variable tells: Paddle's launcher sets none for it.
Sources: paddle.distributed.launch, controllers/collective.py; SLURM's sbatch page, "SLURM_RESTART_COUNT".
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paddlemix.checkpoints.files.weight_files import write_json
from paddlemix.errors import UserError
from paddlemix.json_files import read_object

JOB_FILE = "started_by.json"


@dataclass(frozen=True)
class Job:
    """What has started the processes of a run.

    Args:
        launchers: of all nodes, each by its host, process and time of start, or by its own name; none where the user
            starts processes.
        queued: number of its job in SLURM; "" outside.
        restarts: how often SLURM has restarted that job.
    """

    launchers: tuple[str, ...] = ()
    queued: str = ""
    restarts: int = 0

    @staticmethod
    def of_process(environment: Mapping[str, str] | None = None) -> Job:
        """That of this process alone.

        Args:
            environment: variables by name; None for this process's own.
        """
        variables = os.environ if environment is None else environment
        # Set by Paddle's launcher and ours in their workers alone.  The parent of any other process is the user's
        # shell, to which a platform may have exported endpoints and ranks.
        launched = "PADDLE_RANK_IN_NODE" in variables
        launchers = [f"{socket.gethostname()} {_started(os.getppid())}"] if launched else []
        # Paddle's names itself at random, which also reaches workers that a script of the user's starts.  Without its
        # variable for logs, such a name is that of a container of Kubernetes, in which a user may start a run twice.
        if launched and "PADDLE_LOG_DIR" in variables and "POD_NAME" in variables:
            launchers.append(f"pod {variables['POD_NAME']}")
        cluster, number = variables.get("SLURM_CLUSTER_NAME", ""), variables.get("SLURM_JOB_ID", "")
        count = variables.get("SLURM_RESTART_COUNT", "")
        return Job(
            launchers=tuple(launchers),
            queued=f"{cluster}/{number}" if number else "",
            restarts=int(count) if count.isdecimal() else 0,
        )

    @staticmethod
    def of_all(jobs: Sequence[Job]) -> Job:
        """That of a run, from those of its processes; the first one's where SLURM says different things."""
        launchers = {launcher for job in jobs for launcher in job.launchers}
        return Job(tuple(sorted(launchers)), jobs[0].queued, jobs[0].restarts)

    def restarts_that_of(self, before: Job) -> bool:
        """Whether this is the job of an earlier start, started again by no user."""
        # A launcher of one node is enough: the others, and with them the first process, may be new ones.
        if set(self.launchers) & set(before.launchers):
            return True
        # By hand, a user can start a run twice in one job; SLURM's count is then the same.
        return bool(self.queued) and self.queued == before.queued and self.restarts > before.restarts

    def write(self, output_dir: Path) -> None:
        """Remembers it in a run's folder.

        Raises:
            UserError: it cannot be written.
        """
        write_json(output_dir / JOB_FILE, asdict(self))


def read_job(output_dir: Path) -> Job:
    """What has last started the run in a folder; an empty one where that is not known."""
    try:
        values: dict[str, Any] = read_object(output_dir / JOB_FILE)
        return Job(tuple(map(str, values["launchers"])), str(values["queued"]), int(values["restarts"]))
    except (UserError, KeyError, TypeError, ValueError):
        return Job()


def _started(process: int) -> str:
    """A process and its time of start, in the system's ticks: numbers of processes come again."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not on Linux
        return str(process)
    # The name, in parentheses, may hold spaces; the start is the 20th field after it.
    return f"{process} {text.rpartition(')')[2].split()[19]}"
