"""The machines of a run, as one launcher sees them: where all processes are, who asks to stop, who failed.

A run on one machine is a `Nodes`; `meeting.py` has the same for several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paddlemix.launch.cards import Cards
from paddlemix.launch.events import Readers, Signals
from paddlemix.launch.first_failure import Failure
from paddlemix.launch.worker_environment import Places, free_ports

_HERE = "127.0.0.1"


@dataclass(frozen=True)
class Message:
    """What another machine's launcher says.

    Args:
        stop: a signal that a user or a scheduler sent there.
        failure: of one of its processes, or the one that is taken as the first.
        is_decided: whether it is that one.
        is_again: whether the run starts again after it.
    """

    stop: int | None = None
    failure: Failure | None = None
    is_decided: bool = False
    is_again: bool = False


class Nodes:
    """One machine alone.

    Args:
        cards: of this machine.
        environment: may limit the ports, see `free_ports`.

    Attributes:
        node: number of this machine.
        is_waiting: whether other machines still work although this one is done.
    """

    is_waiting = False

    def __init__(self, cards: Cards, environment: Mapping[str, str]) -> None:
        self._cards, self._environment = cards, environment
        self.node = 0

    def gather(self, signals: Signals) -> Places:
        """Where all processes of the next start are; waits for the other machines.

        Raises:
            UserError: some did not come, or do not fit together.
            Stopped: a signal came meanwhile.
        """
        *ports, store = free_ports(self._cards.processes + 1, self._environment)
        return Places(f"{_HERE}:{store}", [[f"{_HERE}:{port}" for port in ports]])

    def readers(self) -> Readers:
        """What to call when a descriptor can be read."""
        return {}

    def messages(self) -> Sequence[Message]:
        """What has come since the last call."""
        return ()

    def tell_stop(self, number: int) -> None:
        """A signal asks this run to stop."""

    def tell_done(self) -> None:
        """The processes of this machine have ended; may be called again."""

    def decide(self, failure: Failure, may_restart: bool) -> tuple[Failure, bool] | None:
        """Which failure was the first of all machines, and whether the run starts again.

        Args:
            failure: the first that is known here.
            may_restart: whether another start is allowed; the first machine's word counts.

        Returns:
            None until it is known; to be asked again.
        """
        return failure, may_restart and failure.is_crash

    def close(self) -> None:
        """Ends all connections."""
