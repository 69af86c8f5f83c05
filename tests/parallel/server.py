"""Runs jobs in several processes at once that need no time to load: one process loads paddle and forks them.

Started as `python -m tests.parallel.server cpu|npu|strict`; it computes nothing itself, because what paddle starts for
that does not survive a fork.  Per line of its input, a job as `tests.parallel.cluster.job_of` makes it, it forks one
process per rank with what Paddle's launcher sets, and answers with a line of exit statuses, negative for a signal.

As the launcher does, it ends the others when one has failed; later, so that what they say about it by themselves is
seen.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

_LOADED = ("paddlemix.trainer.recipe", "paddlemix.generation.predict_file")
_LOADED += ("transformers.models.llama.tokenization_llama", "matplotlib.pyplot")  # loaded later by every run
_HOST = "127.0.0.1"


def launched_environment(where: str, rank: int, ports: list[int]) -> dict[str, str]:
    """What Paddle's launcher sets in one of len(ports) - 1 processes of this machine.

    Args:
        ports: free ones, the first for the store in which the processes find each other.

    Source: paddle.distributed.launch, controllers/collective.py `_build_pod_with_master`.
    """
    endpoints = [f"{_HOST}:{port}" for port in ports[1:]]
    backend = {"PADDLE_DISTRI_BACKEND": "gloo"} if where == "cpu" else _NPU | {"FLAGS_selected_npus": str(rank)}
    return backend | {
        "PADDLE_MASTER": f"{_HOST}:{ports[0]}",
        "PADDLE_GLOBAL_SIZE": str(len(endpoints)),
        "PADDLE_LOCAL_SIZE": str(len(endpoints)),
        "PADDLE_GLOBAL_RANK": str(rank),
        "PADDLE_LOCAL_RANK": str(rank),
        "PADDLE_NNODES": "1",
        "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
        "PADDLE_TRAINER_ID": str(rank),
        "PADDLE_TRAINERS_NUM": str(len(endpoints)),
        "PADDLE_RANK_IN_NODE": str(rank),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
    }


_NPU = {"PADDLE_DISTRI_BACKEND": "xccl", "PADDLE_XCCL_BACKEND": "npu"}


def _reserved(count: int) -> list[socket.socket]:
    """Sockets bound to free ports.  They do not listen and allow reuse, so a process that does the same can bind and
    listen there, while the system gives the port to nobody else."""
    held = []
    for _ in range(count):
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind((_HOST, 0))
        held.append(one)
    return held


def _start(job: dict[str, Any], where: str, rank: int, ports: list[int]) -> int:
    """The id of a new process that runs the job as `rank`."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        log = os.open(Path(job["folder"]) / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor, opened in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
            os.dup2(opened, descriptor)
        if job["ranks"] > 1:
            os.environ.update(launched_environment(where, rank, ports))
        os.environ.update(job["variables"])
        _forget_environment()
        if rank:
            _let_the_first_listen(ports[0])
        from tests.parallel.rank import run_job

        status = run_job(job, rank)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _forget_environment() -> None:
    """Paddle has read the variables of a process alone while it was imported; it reads them again."""
    import paddle.distributed.parallel as parallel

    parallel._global_parallel_env = None


def _let_the_first_listen(port: int) -> None:
    """Paddle tries again after 3 seconds where it comes before the first process listens: it is held until then."""
    from paddle.base import core

    join = core.create_or_get_global_tcp_store

    def wait_and_join() -> Any:
        while not _listens(port):
            time.sleep(0.002)
        return join()

    core.create_or_get_global_tcp_store = wait_and_join


def _listens(port: int) -> bool:
    """Whether a process of this machine listens at a port, by the system's tables of sockets of IPv4 and IPv6."""
    listening = re.compile(rf":{port:04X} 0+:0000 0A ")  # local port, no peer, state LISTEN
    tables = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
    return any(listening.search(table.read_text()) for table in tables if table.exists())


def _wait(pids: list[int], limit: float, patience: float) -> list[int]:
    """Every process's status.

    Args:
        limit: seconds until all are killed.
        patience: seconds from the first failure until the others are killed.
    """
    statuses: dict[int, int] = {}
    end = time.monotonic() + limit
    while len(statuses) < len(pids):
        for pid in set(pids) - statuses.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                statuses[pid] = os.waitstatus_to_exitcode(status)
                if statuses[pid] and len(statuses) < len(pids):
                    end = min(end, time.monotonic() + patience)
        if time.monotonic() > end:
            for pid in set(pids) - statuses.keys():
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [statuses[pid] for pid in pids]


def _serve(where: str) -> None:
    for name in _LOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        held = _reserved(job["ranks"] + 1)
        ports = [one.getsockname()[1] for one in held]
        pids = [_start(job, where, rank, ports) for rank in range(job["ranks"])]
        statuses = _wait(pids, job["limit"], job["patience"])
        for one in held:
            one.close()
        sys.stdout.write(f"{json.dumps(statuses)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve(sys.argv[1])
