"""Starts a command as the processes of a run, again after a crash if that is allowed, and says how it ended."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paddlemix.errors import without_secrets
from paddlemix.launch.cards import Cards
from paddlemix.launch.events import Signals
from paddlemix.launch.first_failure import USER_ERROR, Failure
from paddlemix.launch.first_node import FirstNode, listen
from paddlemix.launch.nodes import Nodes
from paddlemix.launch.options import LaunchOptions
from paddlemix.launch.other_node import OtherNode
from paddlemix.launch.rank_logs import RankLogs, end_of_log
from paddlemix.launch.supervisor import Attempt
from paddlemix.launch.variables import TERMINAL
from paddlemix.launch.worker_environment import Places, WorkerPlace, worker_environment
from paddlemix.launch.worker_process import WorkerStart
from paddlemix.log import logger


@dataclass(frozen=True)
class Job:
    """What is started.

    Args:
        script: a Python file.
        arguments: its own.
        options: how.
        cards: what the processes of this machine compute on.
        log_dir: one log per process.
        results: statuses other than 0 by which the command says how it went.
        reports_begin: whether its processes say when their work begins, see `worker.report_begin`.
        has_terminal: whether the first process talks with the user: it has this process's input and output and stays in
            its group, so that Ctrl-C and Ctrl-Z reach it, the others end with it, and no log is left unless something
            broke.
    """

    script: Path
    arguments: Sequence[str]
    options: LaunchOptions
    cards: Cards
    log_dir: Path
    results: frozenset[int] = frozenset()
    reports_begin: bool = False
    has_terminal: bool = False

    @property
    def command(self) -> list[str]:
        """What each process runs; unbuffered, so that the log of one that is killed is whole."""
        return [sys.executable, "-u", str(self.script), *self.arguments]


def equivalent_command(job: Job) -> str:
    """The command line of Paddle's own launcher that starts the same processes."""
    options, cards = job.options, job.cards
    words = ["python", "-m", "paddle.distributed.launch"]
    if options.master is not None:
        words += ["--nnodes", str(options.nodes), "--master", f"{options.master[0]}:{options.master[1]}"]
        words += ["--rank", str(options.node)] if options.node is not None else []
    words += ["--devices", ",".join(cards.names)] if cards.names else ["--nproc_per_node", str(cards.processes)]
    words += ["--log_dir", _shown(job.log_dir), _shown(job.script), *job.arguments]
    return shlex.join(words)


def _shown(path: Path) -> str:
    """Relative where it is below the working directory."""
    with contextlib.suppress(ValueError):
        return str(path.absolute().relative_to(Path.cwd()))
    return str(path)


def launch(job: Job, environment: Mapping[str, str]) -> int:
    """Runs it until it ends.

    Args:
        environment: variables by name, which the workers get too.

    Returns:
        The exit status: 0; that of the process that failed first; 128 + the signal after a stop.

    Raises:
        UserError: a log cannot be written, or machines do not come together.
        Stopped: a signal came before anything had been started.
    """
    with Signals() as signals, contextlib.ExitStack() as stack:
        nodes = open_nodes(job.options, job.cards, environment)
        stack.callback(nodes.close)
        logs = RankLogs(job.log_dir)
        stack.callback(logs.remove_empty)
        restart = 0
        while True:
            places = nodes.gather(signals)
            starts = _starts(job, logs, WorkerPlace(places, nodes.node, 0), environment, restart)
            _report_start(job, places, nodes.node, logs)
            end = Attempt(starts, signals, nodes, restart < job.options.restarts, job.results).run()
            if end.failure is not None and not _is_told(job, end.failure, nodes.node):
                _report_failure(end.failure)
            if end.result_log is not None:
                sys.stderr.write("".join(f"{line}\n" for line in _end_of(end.result_log)))
            if not end.is_again:
                break
            restart += 1
            logger.warning("starting again (%d of at most %d)", restart, job.options.restarts)
    # The same status ends a run of days whose disk is full or whose loss is NaN, and a script of the user's for reasons
    # of its own: only of a run that is known not to have begun is nothing lost with its logs.
    if end.status == USER_ERROR and job.reports_begin and not (restart or end.has_begun):
        logs.remove_new()
    if job.has_terminal and (end.failure is None or _is_told(job, end.failure, nodes.node)):
        logs.remove_new()
    return end.status


def _is_told(job: Job, failure: Failure, node: int) -> bool:
    """Whether the user has seen the failure already: the first process has said it as if it were alone."""
    if failure.rank or node:
        return False
    return failure.is_final or (job.has_terminal and failure.status == 128 + signal.SIGINT)


def open_nodes(options: LaunchOptions, cards: Cards, environment: Mapping[str, str]) -> Nodes:
    """The launchers of this run's machines.

    Without a number, the machine on which the master's address is its own and the port free is the first.

    Raises:
        UserError: the address or port of the master cannot be used.
    """
    if options.master is None:
        return Nodes(cards, environment)
    listener = None if options.node else listen(options.master, must=options.node == 0)
    if listener is None:
        return OtherNode(options, cards, environment)
    return FirstNode(options, cards, environment, listener)


def _starts(
    job: Job, logs: RankLogs, first: WorkerPlace, environment: Mapping[str, str], restart: int
) -> list[WorkerStart]:
    title = without_secrets(shlex.join(job.command)) + (f" (start {restart + 1})" if restart else "")
    places = [WorkerPlace(first.places, first.node, local) for local in range(job.cards.processes)]
    return [
        WorkerStart(
            place.rank,
            job.command,
            _environment_of(place, job, environment, restart),
            logs.begin(place.rank, title),
            is_shown=place.rank == 0,
            has_terminal=_has_terminal(job, place),
        )
        for place in places
    ]


def _environment_of(
    place: WorkerPlace, job: Job, environment: Mapping[str, str], restart: int
) -> Callable[[str], dict[str, str]]:
    more = {TERMINAL: "1"} if _has_terminal(job, place) else {}
    return lambda failure_file: worker_environment(place, job.cards, environment, failure_file, restart) | more


def _has_terminal(job: Job, place: WorkerPlace) -> bool:
    return job.has_terminal and place.rank == 0


def _report_start(job: Job, places: Places, node: int, logs: RankLogs) -> None:
    first = places.first_rank(node)
    last = first + job.cards.processes - 1
    where = f"{job.cards.kind} {','.join(job.cards.names)}" if job.cards.names else job.cards.kind
    ranks = f"rank {first}" if first == last else f"ranks {first} to {last}"
    of = f" of {places.processes}" if node or last + 1 < places.processes else ""
    logger.info("starting %s%s on %s, logs in %s", ranks, of, where, _shown(logs.folder))


def _report_failure(failure: Failure) -> None:
    """Says who failed first, and why; the log of a process that is not shown anyway, too."""
    sys.stdout.flush()
    when = time.strftime("%H:%M:%S", time.localtime(failure.time))
    who = "" if failure.rank is None else f"rank {failure.rank} failed first, at {when}: "
    lines = [f"error: {who}{failure.message}"]
    # A fault of the user's input is told whole by its message.
    if failure.rank and not failure.is_final:
        lines += _end_of(Path(failure.log))
    sys.stderr.write("\n".join(lines) + "\n")
    sys.stderr.flush()


def _end_of(log: Path) -> list[str]:
    tail = end_of_log(str(log))
    return [f"the end of {_shown(log)}:", *(f"  {line}" for line in tail)] if tail else []
