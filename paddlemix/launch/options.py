"""What the command line and the environment say about the processes of a run.

Flags win over variables.  Variables are those of Paddle, of torchrun (ms-swift's scripts export them too) and of
SLURM's `srun`; two that contradict each other are an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paddlemix.errors import UserError, cut
from paddlemix.launch.process_rules import how_often_started
from paddlemix.paths import user_path

# Flag -> what it sets; a dash and an underscore are the same.
FLAGS = {
    **dict.fromkeys(("devices", "gpus", "npus", "xpus"), "devices"),
    **dict.fromkeys(("nproc", "nproc_per_node"), "processes"),
    "nnodes": "nodes",
    **dict.fromkeys(("rank", "node_rank"), "node"),
    "master": "master",
    "master_addr": "address",
    "master_port": "port",
    **dict.fromkeys(("max_restart", "max_restarts"), "restarts"),
    "log_dir": "log_dir",
}
# Variables, and what they set where no flag does.
VARIABLES = {
    "devices": ("PADDLE_DEVICES",),
    "processes": ("PADDLE_NPROC_PER_NODE", "NPROC_PER_NODE"),
    "nodes": ("PADDLE_NNODES", "NNODES"),
    # PADDLE_TRAINER_ID outside a worker is a platform's number of the node, as Paddle's launcher takes it.
    "node": ("PADDLE_RANK", "NODE_RANK", "PADDLE_TRAINER_ID"),
    "master": ("PADDLE_MASTER",),
    "address": ("MASTER_ADDR",),
    "port": ("MASTER_PORT",),
}
# Set by `srun` in each of its tasks; heeded only where a master is named, since a script may use one node of several.
SLURM = {"nodes": "SLURM_STEP_NUM_NODES", "node": "SLURM_NODEID"}
DEFAULT_PORT = 29500  # Source: torchrun's, for a MASTER_ADDR without a MASTER_PORT
_MOST_PROCESSES, _MOST_NODES, _MOST_RESTARTS, _LAST_PORT = 1024, 4096, 1000, 65535


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """How a run is to be started.

    Args:
        devices: numbers of cards, one process each; None for all visible ones.
        processes: on this machine; None for one per card, on CPU for one.
        nodes: machines of the run, >= 1.
        master: address and port at which the launchers of several machines meet; None on a single one.
        node: number of this machine, 0 to nodes - 1; None lets the launchers agree.
        restarts: how often the run is started again after a crash.
        log_dir: of one log per process; None for a folder in the run's output.
        is_dry: whether to start nothing.
    """

    devices: tuple[str, ...] | None = None
    processes: int | None = None
    nodes: int = 1
    master: tuple[str, int] | None = None
    node: int | None = None
    restarts: int = 0
    log_dir: Path | None = None
    is_dry: bool = False


@dataclass
class _Given:
    """Values by what they set, each with the flag or the variable that it came from."""

    values: dict[str, tuple[str, str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def put(self, name: str, source: str, text: str) -> None:
        earlier = self.values.setdefault(name, (source, text))
        if earlier[1] != text:
            self.faults.append(f"{earlier[0]}={cut(earlier[1], 40)} and {source}={cut(text, 40)} differ; give one")

    def read(self, name: str, read: Callable[[str], Any]) -> Any:
        """The value of `name`, None if it is not given or is wrong, which is noted."""
        source, text = self.values.get(name, ("", ""))
        if not source:
            return None
        try:
            return read(text)
        except ValueError as error:
            self.faults.append(f"{source}={cut(text, 40)} {error}")
            return None


def take_options(argv: list[str], environment: Mapping[str, str]) -> tuple[LaunchOptions, list[str]]:
    """Separates the launcher's own flags from those of the command that it starts.

    Args:
        argv: the arguments after the command's name.
        environment: variables by name.

    Returns:
        The options, and the other arguments in their order.

    Raises:
        UserError: flags without a value, wrong values, and flags or variables that contradict each other, one per line.
    """
    given, rest, is_dry = _Given(), [], False
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, equals, text = word.partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        if name == "dry_run":
            is_dry = True
        elif name not in FLAGS:
            rest.append(word)
        elif not equals and (not words or words[0].startswith("--")):
            given.faults.append(f"{flag} needs a value after it")
        else:
            given.put(FLAGS[name], flag, text if equals else words.pop(0))
    _add_variables(given, environment)
    _check_starts(given, environment)
    options = _checked(given, is_dry)
    if given.faults:
        raise UserError("\n".join(f"command line: {fault}" for fault in given.faults))
    return options, rest


def _add_variables(given: _Given, environment: Mapping[str, str]) -> None:
    flags = set(given.values)
    # A master on the command line, in either form, leaves those of the environment aside.
    if flags & {"master", "address"}:
        flags |= {"master", "address", "port"} - ({"port"} if "address" in flags else set())
    # A list of cards on the command line says how many processes there are.
    flags |= {"processes"} if "devices" in flags else set()
    for name, variables in VARIABLES.items():
        for variable in variables:
            if name not in flags and environment.get(variable):
                given.put(name, variable, environment[variable])
    if {"master", "address"} & set(given.values):
        for name, variable in SLURM.items():
            if name not in given.values and environment.get(variable):
                given.put(name, variable, environment[variable])


def _check_starts(given: _Given, environment: Mapping[str, str]) -> None:
    """Refuses a launcher that is one of several which do not know of each other: each would begin a run of its own."""
    nodes = given.values.get("nodes")
    # A number of machines that the user gives is meant, 1 too; SLURM's own 1 is that of several launchers on one.
    if nodes is not None and nodes != (SLURM["nodes"], "1"):
        return
    if (told := how_often_started(environment)) is not None:
        given.faults.append(
            f"{told.how}, and each launcher would begin a run of its own; for one run of several machines start it "
            "once on each, with --nnodes N --master IP:PORT, for several runs give --nnodes 1"
        )


def _checked(given: _Given, is_dry: bool) -> LaunchOptions:
    devices = given.read("devices", _devices)
    processes = given.read("processes", _number(1, _MOST_PROCESSES))
    nodes = given.read("nodes", _nodes) or 1
    master = _master(given, nodes)
    # The number of a machine says nothing where there is one, and platforms set it there too.
    node = given.read("node", _number(0, nodes - 1)) if nodes > 1 else None
    if devices is not None and processes is not None and len(devices) != processes:
        sources = given.values["devices"][0], given.values["processes"][0]
        given.faults.append(
            f"{sources[0]} names {len(devices)} cards and {sources[1]} {processes} processes; there is one process per "
            "card, so give one of the two"
        )
    if nodes > 1 and master is None and not given.faults:
        given.faults.append(
            f"{given.values['nodes'][0]}={nodes} needs --master IP:PORT: an address of the first machine and a free "
            "port there, the same on every machine"
        )
    return LaunchOptions(
        devices=devices,
        processes=processes,
        nodes=nodes,
        master=master if nodes > 1 else None,
        node=node,
        restarts=given.read("restarts", _number(0, _MOST_RESTARTS)) or 0,
        log_dir=given.read("log_dir", lambda text: user_path(text, "--log-dir")),
        is_dry=is_dry,
    )


def _master(given: _Given, nodes: int) -> tuple[str, int] | None:
    """The meeting place, from either of its two forms; both at once have to name the same one."""
    master = given.read("master", _endpoint)
    address, port = given.read("address", str), given.read("port", _number(1, _LAST_PORT))
    if master is None:
        return None if address is None else (address, port or DEFAULT_PORT)
    # On a single machine, where nobody meets, a platform may set whatever it likes.
    for name, value, own in (("address", address, master[0]), ("port", port, master[1])):
        if nodes > 1 and value not in (None, own):
            one, other = given.values["master"], given.values[name]
            given.faults.append(f"{one[0]}={cut(one[1], 40)} and {other[0]}={cut(other[1], 40)} differ; give one")
    return master


def _number(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isdecimal() and len(text) <= len(str(most)) and least <= int(text) <= most):
            raise ValueError(f"is not a whole number of {least} to {most}")
        return int(text)

    return read


def _nodes(text: str) -> int:
    if ":" in text:
        raise ValueError("is a range; the number of machines is fixed during a run, give one number")
    return _number(1, _MOST_NODES)(text)


def _devices(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise ValueError("is not a list of cards; write their numbers with commas, e.g. 0,1")
    if len(set(names)) < len(names):
        raise ValueError("names a card twice")
    return names


def _endpoint(text: str) -> tuple[str, int]:
    if text.startswith("etcd://"):
        raise ValueError("is an etcd server, which python -m paddle.distributed.launch can use; give IP:PORT")
    host, colon, port = text.removeprefix("http://").rpartition(":")
    if not (colon and host):
        raise ValueError("has no port; write IP:PORT")
    return host, _number(1, _LAST_PORT)(port)
