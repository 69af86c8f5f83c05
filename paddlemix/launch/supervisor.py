"""The workers of one start on this machine: started, watched, asked to stop, ended together.

Why not Paddle's launcher around them.  Asked to stop, it sends each worker SIGTERM three times within 0.6 seconds, one
worker after the other, and kills them after 30 seconds, 3 where one failed: less than a checkpoint takes.  It shows the
lowest rank that failed in place of the first, and gives no way to change either.  What it does for a worker besides is
a table of variables, see `worker_environment.py`; a run under it works as well, as long as nobody stops it.
"""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from paddlemix.launch.events import SAME_SIGNAL, STOP_SIGNALS, Signals, is_in_foreground
from paddlemix.launch.first_failure import STOPPED, Failure, failure_of, first_failure, memory_kills, read_failure_file
from paddlemix.launch.nodes import Nodes
from paddlemix.launch.relay import LogLines, Relay, open_relays
from paddlemix.launch.variables import begin_file
from paddlemix.launch.worker import INTERRUPTED
from paddlemix.launch.worker_process import Worker, WorkerStart, start_process
from paddlemix.log import logger

_TICK = 0.5  # seconds between two looks at what sends no signal
_SHOW_TICK = 0.02  # the same while the terminal is slow
_SETTLE = 1.0  # until it is decided who failed first: what follows from it is noticed meanwhile
_GRACE = 3.0  # seconds that the others have to say what they saw, and to end
_CUT_OFF_GRACE = 10.0  # the same after a stop before anything could be saved


@dataclass(frozen=True)
class End:
    """How a start ended.

    Args:
        status: of the launcher, unless it starts again.
        failure: the first one; None where all ended as they should.
        result_log: of the process whose result the status is, where that is not shown.
        is_again: whether the run starts again.
        has_begun: whether a worker of this machine has said that its work began, see `worker.report_begin`.
    """

    status: int
    failure: Failure | None = None
    is_again: bool = False
    result_log: Path | None = None
    has_begun: bool = False


@dataclass
class Attempt:
    """One start.  `run` returns when every worker has ended.

    Args:
        signals: of this process.
        nodes: the other machines' launchers.
        may_restart: whether a crash is to be followed by another start.
        results: statuses other than 0 that are a command's result; the others are failures.
    """

    starts: Sequence[WorkerStart]
    signals: Signals
    nodes: Nodes
    may_restart: bool
    results: frozenset[int] = frozenset()
    _workers: list[Worker] = field(default_factory=list)
    _relays: list[Relay] = field(default_factory=list)
    _lines: list[LogLines] = field(default_factory=list)
    _stop: int | None = None
    _stopped_at: float = 0.0
    _noticed: float | None = None  # when the first failure was
    _talker_ended: float | None = None  # when the worker with the terminal was
    _first: Failure | None = None
    _is_again: bool = False
    _is_at_once: bool = False  # ended by a second signal
    _elsewhere: list[Failure] = field(default_factory=list)
    _killed: set[int] = field(default_factory=set)

    def run(self) -> End:
        """Starts the workers, and waits for them.

        Returns:
            How it ended; no worker is left.
        """
        kills = memory_kills()
        with tempfile.TemporaryDirectory(prefix="paddlemix-launch-") as folder:
            try:
                for start in self.starts:
                    self._workers.append(self._start(start, Path(folder)))
                while self._is_running():
                    is_left = [relay.show() for relay in self._relays]
                    self._handle(self.signals.wait(self._readers(), _SHOW_TICK if any(is_left) else _TICK))
                    self._look(memory_kills() > kills)
            finally:
                self._kill_all()  # left only where something went wrong here
                self._close()
            has_begun = any(begin_file(worker.failure_file).exists() for worker in self._workers)
        return replace(self._end(), has_begun=has_begun)

    def _start(self, start: WorkerStart, folder: Path) -> Worker:
        failure_file = folder / f"rank-{start.rank}.json"
        environment = start.environment(str(failure_file))
        if start.has_terminal:
            process = start_process(start, environment, None, None)
        elif start.is_shown:
            self._relays, lines = open_relays(start.log)
            self._lines.append(lines)
            outputs = self._relays[0].writes, self._relays[-1].writes
            process = start_process(start, environment, *outputs)
            for relay in self._relays:
                relay.started()
        else:
            with open(start.log, "ab") as file:
                process = start_process(start, environment, file.fileno(), file.fileno())
        return Worker(start.rank, process, start.log, failure_file, start.has_terminal)

    def _is_running(self) -> bool:
        if any(worker.code is None for worker in self._workers):
            return True
        is_undecided = self._noticed is not None and self._first is None
        return not self._is_at_once and (is_undecided or self.nodes.is_waiting)

    def _readers(self) -> dict[int, Callable[[], None]]:
        return {relay.reads: relay.pump for relay in self._relays if relay.is_open} | dict(self.nodes.readers())

    def _handle(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if number == signal.SIGWINCH:
                for relay in self._relays:
                    relay.resize()
            elif number == signal.SIGINT and self._with_terminal is not None:
                # A terminal has sent it to both; a program that started us, to us alone.
                if not is_in_foreground():
                    self._with_terminal.process.send_signal(number)
            elif number in STOP_SIGNALS:
                self._asked_to_stop(number)
        for message in self.nodes.messages():
            if message.stop is not None and self._stop is None:
                self._pass_on_stop(message.stop)
                # A worker may say so much later: while it waits for others in a library, its own handler does not run.
                name = signal.Signals(message.stop).name
                logger.warning("%s on another machine: asked %d processes to save", name, len(self._workers))
            if message.failure is not None:
                self._failed_elsewhere(message.failure, message.is_decided, message.is_again)

    def _asked_to_stop(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._stop is None:
            count, what = len(self._workers), "end" if self._with_terminal else "save"  # a chat has nothing to save
            logger.warning(
                "%s: asking %d processes to %s (again after %d s: end at once)", name, count, what, SAME_SIGNAL
            )
            self.nodes.tell_stop(number)
            self._pass_on_stop(number)
        elif not self._is_at_once and time.monotonic() - self._stopped_at > SAME_SIGNAL:
            logger.warning("%s again: ending at once", name)
            self._is_at_once = True
            self._kill_all()

    def _pass_on_stop(self, number: int) -> None:
        """Asks each worker once; it is the worker itself that is asked, its helpers are the worker's own."""
        self._stop, self._stopped_at = number, time.monotonic()
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.process.send_signal(number)

    def _look(self, out_of_memory: bool) -> None:
        """Notices who has ended or failed, and does what follows."""
        now = time.time()
        for worker in self._workers:
            if worker.code is None:
                worker.code = worker.process.poll()
                # A worker may say that it fails, and then hang in a library's last rites.
                if worker.code is None and read_failure_file(worker.failure_file) is None:
                    continue
            if worker.failure is None and self._is_failure(worker):
                worker.failure = failure_of(
                    worker.rank, worker.code, worker.failure_file, now, str(worker.log), out_of_memory
                )
                self._noticed = self._noticed or time.monotonic()
        self._act(time.monotonic())
        ended = all(worker.code is not None for worker in self._workers)
        if ended and self._noticed is None and not self._is_at_once:
            self.nodes.tell_done()

    def _is_failure(self, worker: Worker) -> bool:
        if worker.code == 0 or worker.rank in self._killed:
            return False
        left = read_failure_file(worker.failure_file)
        if left is not None and left["kind"] == INTERRUPTED:
            return self._stop is None
        if left is not None or worker.code is None:
            return left is not None
        # A stop that was agreed on: asked of one worker by hand, all end with its status.
        return worker.code not in self.results.union(STOPPED) and not (
            self._stop is not None and worker.code == -self._stop
        )

    def _act(self, now: float) -> None:
        if self._first is None and self._noticed is not None and now - self._noticed >= _SETTLE:
            self._decide()
        # Before its first step a worker ends at once, without a checkpoint; others may wait for it in vain.
        cut_off = self._stop is not None and any(self._was_cut_off(worker) for worker in self._workers)
        if (self._noticed is not None and now - self._noticed > _GRACE) or (
            cut_off and now - self._stopped_at > _CUT_OFF_GRACE
        ):
            self._kill_all()
        # Whoever talked with the user is gone: nothing is left to do for the others, which end by themselves.
        talker = self._with_terminal
        if talker is not None and talker.code is not None:
            self._talker_ended = self._talker_ended or now
            if now - self._talker_ended > _GRACE:
                self._kill_all()

    @property
    def _with_terminal(self) -> Worker | None:
        return next((worker for worker in self._workers if worker.has_terminal), None)

    def _was_cut_off(self, worker: Worker) -> bool:
        left = read_failure_file(worker.failure_file)
        return worker.code == -(self._stop or 0) or (left is not None and left["kind"] == INTERRUPTED)

    def _decide(self) -> None:
        first = first_failure([*self._failures(), *self._elsewhere])
        decided = self.nodes.decide(first, self.may_restart)
        if decided is not None:
            self._first, self._is_again = decided

    def _failed_elsewhere(self, failure: Failure, is_decided: bool, is_again: bool) -> None:
        self._noticed = self._noticed or time.monotonic()
        self._elsewhere.append(failure)
        if is_decided:
            self._first, self._is_again = failure, is_again

    def _failures(self) -> list[Failure]:
        return [worker.failure for worker in self._workers if worker.failure is not None]

    def _kill_all(self) -> None:
        for worker in self._workers:
            if worker.process.poll() is None:
                self._killed.add(worker.rank)
                worker.kill()

    def _close(self) -> None:
        for worker in self._workers:
            worker.process.wait()
        for relay in self._relays:
            relay.finish()
        for lines in self._lines:
            lines.close()

    def _end(self) -> End:
        if self._is_at_once and self._stop is not None:
            return End(128 + self._stop)
        if self._first is not None:
            # The same fault in the user's input may have been noticed here later, and shown here by the first process.
            same = [failure for failure in self._failures() if failure.message == self._first.message]
            first = first_failure([self._first, *same])
            return End(first.status, first, self._is_again and self._stop is None)
        talker = self._with_terminal  # whose status counts where there is one; the others may have been ended for it
        told = [worker for worker in self._workers if worker.code and talker in (None, worker)]
        if self._stop is not None and told:
            return End(128 + self._stop)
        if not told:
            return End(0)
        is_hidden = told[0].rank > 0 and told[0].code in self.results
        return End(told[0].code or 0, result_log=told[0].log if is_hidden else None)
