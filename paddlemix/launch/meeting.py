"""Launchers of several machines: they meet at the first one's port, and stay connected while the run lasts.

Paddle's launchers meet too, but then go their own ways: a machine that fails leaves the others waiting for its cards
until their library's time-out, half an hour by default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paddlemix.errors import Stopped
from paddlemix.launch.cards import Cards
from paddlemix.launch.events import STOP_SIGNALS, Readers, Signals
from paddlemix.launch.nodes import Message, Nodes
from paddlemix.launch.options import LaunchOptions
from paddlemix.launch.worker_environment import free_ports

JOIN_SECONDS = 1800.0  # for the slowest machine of a job to be given out
RETRY_SECONDS = 1.0


class Meeting(Nodes):
    """What both sides share.

    Args:
        options: `master` is set.
    """

    def __init__(self, options: LaunchOptions, cards: Cards, environment: Mapping[str, str]) -> None:
        super().__init__(cards, environment)
        assert options.master is not None
        self._options, self._master = options, options.master
        self._messages: list[Message] = []
        self._is_done = self._is_decided = False

    def messages(self) -> Sequence[Message]:
        found, self._messages = self._messages, []
        return found

    def _hello(self) -> dict[str, Any]:
        return {
            "node": self.node if self.node else self._options.node,
            "nodes": self._options.nodes,
            "kind": self._cards.kind,
            "ports": free_ports(self._cards.processes + 1, self._environment),
        }

    def _wait(self, signals: Signals, readers: Readers, seconds: float, closing: Callable[[int], None]) -> None:
        """Waits once while machines gather; a signal ends it."""
        for number in signals.wait(readers, seconds):
            if number in STOP_SIGNALS:
                closing(number)
                raise Stopped(number)
