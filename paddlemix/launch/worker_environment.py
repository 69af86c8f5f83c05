"""What a worker finds in its environment: the variables of Paddle's launcher, and ours.

What Paddle and the kernels read besides, such as threads for a share of the cores, each worker sets by itself as under
any launcher, see `device/`.  Source: paddle 3.3.1, distributed/launch/controllers/collective.py.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paddlemix.errors import UserError
from paddlemix.launch.cards import Cards
from paddlemix.launch.variables import FAILURE_FILE, LAUNCHER, RESTART, TERMINAL

# What platforms and other launchers leave: a worker would take them for its own.  MASTER_ADDR and MASTER_PORT come
# before PADDLE_MASTER for Paddle, but name the port at which the launchers meet.
_LEFT_BY_OTHERS = (
    *("MASTER_ADDR", "MASTER_PORT", "PADDLE_TRAINERS", "DISTRIBUTED_TRAINER_ENDPOINTS", "PADDLE_BACKUP_ENV_PATH"),
    *("PADDLE_ELASTIC_JOB_ID", "PADDLE_ELASTIC_TIMEOUT", "PADDLE_DISTRI_BACKEND", "PADDLE_XCCL_BACKEND"),
    *(f"FLAGS_selected_{kind}s" for kind in ("gpu", "npu", "xpu", "cpu")),
)
_PORT_RANGE = "PORT_RANGE"  # "35100:35200", as Paddle's launcher reads it; for firewalls


@dataclass(frozen=True)
class Places:
    """Where all processes of a run are; the same on every machine.

    Args:
        store: address and port of the first process, at which all others ask for each other.
        endpoints: of the processes, "10.0.0.1:41000", by machine.
    """

    store: str
    endpoints: Sequence[Sequence[str]]

    def first_rank(self, node: int) -> int:
        """The lowest rank of a machine."""
        return sum(len(endpoints) for endpoints in self.endpoints[:node])

    @property
    def processes(self) -> int:
        """Of all machines."""
        return self.first_rank(len(self.endpoints))


@dataclass(frozen=True)
class WorkerPlace:
    """One process of this machine.

    Args:
        node: number of the machine.
        local: number of the process there.
    """

    places: Places
    node: int
    local: int

    @property
    def rank(self) -> int:
        """Among all processes."""
        return self.places.first_rank(self.node) + self.local


def worker_environment(
    place: WorkerPlace, cards: Cards, environment: Mapping[str, str], failure_file: str, restart: int
) -> dict[str, str]:
    """All variables of a worker.

    Args:
        environment: of the launcher; what the user exported stays, proxies too, through which models are downloaded.
        failure_file: where it is to leave why it failed.
        restart: how often the run was started again.
    """
    places, rank, size = place.places, str(place.rank), str(place.places.processes)
    own = {name: value for name, value in environment.items() if name not in (*_LEFT_BY_OTHERS, TERMINAL)}
    own |= {
        "PADDLE_MASTER": places.store,
        "PADDLE_NNODES": str(len(places.endpoints)),
        "PADDLE_GLOBAL_SIZE": size,
        "PADDLE_GLOBAL_RANK": rank,
        "PADDLE_LOCAL_SIZE": str(cards.processes),
        "PADDLE_LOCAL_RANK": str(place.local),
        "PADDLE_RANK_IN_NODE": str(place.local),
        "PADDLE_TRAINERS_NUM": size,
        "PADDLE_TRAINER_ID": rank,
        "PADDLE_TRAINER_ENDPOINTS": ",".join(",".join(endpoints) for endpoints in places.endpoints),
        "PADDLE_CURRENT_ENDPOINT": places.endpoints[place.node][place.local],
        "PADDLE_AUTO_CLUSTER": "0",
        FAILURE_FILE: failure_file,
        LAUNCHER: str(os.getpid()),
        RESTART: str(restart),
    }
    if cards.kind == "cpu":
        return own | {"PADDLE_DISTRI_BACKEND": "gloo"}
    if cards.kind == "npu":  # a plugin's device
        own |= {"PADDLE_DISTRI_BACKEND": "xccl", "PADDLE_XCCL_BACKEND": cards.kind}
    return own | {f"FLAGS_selected_{cards.kind}s": cards.numbers[place.local]}


def free_ports(count: int, environment: Mapping[str, str]) -> list[int]:
    """Ports of this machine that nobody uses, all different.

    Args:
        environment: PORT_RANGE in it, "FIRST:LAST", limits them.

    Raises:
        UserError: the range is not one, or has too few that are free.
    """
    text = environment.get(_PORT_RANGE, "")
    first, colon, last = text.partition(":")
    if text and not (colon and first.isdecimal() and last.isdecimal() and int(last) < 65536):
        raise UserError(f"{_PORT_RANGE}={text} is not a range of ports; export e.g. {_PORT_RANGE}=35100:35200")
    wanted = iter(range(int(first), int(last) + 1)) if text else iter(lambda: 0, None)  # 0: any free one
    ports: list[int] = []
    with contextlib.ExitStack() as stack:
        # All are held until the last one is found, so that none is found twice.
        while len(ports) < count:
            port = next(wanted, None)
            if port is None:
                raise UserError(f"{_PORT_RANGE}={text} has {len(ports)} free ports, and {count} are needed")
            held = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                held.bind(("", port))
                ports.append(held.getsockname()[1])
    return ports
