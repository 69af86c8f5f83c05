"""Launchers of several machines: they meet at the first one's port, and stay connected while the run lasts.

Paddle's launchers meet too, but then go their own ways: a machine that fails leaves the others waiting for its cards
until their library's time-out, half an hour by default.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paddlemix.errors import Stopped
from paddlemix.launch.cards import Cards
from paddlemix.launch.events import STOP_SIGNALS, Readers, Signals
from paddlemix.launch.nodes import Message, Nodes
from paddlemix.launch.options import LaunchOptions
from paddlemix.launch.worker_environment import free_ports
from paddlemix.log import logger

JOIN_SECONDS = 1800.0  # for the slowest machine of a job to be given out
RETRY_SECONDS = 1.0
LINE_SECONDS = 60.0  # between two lines about what a machine still waits for
_CHANGE_SECONDS = 5.0  # the same where it waits for something else than before


class WaitingLines:
    """Says what a machine waits for: at once, when that changes, and every minute."""

    def __init__(self) -> None:
        self._text, self._at = "", 0.0

    def tell(self, text: str) -> None:
        """Writes it to the log, unless it was written a short time ago; "" is nothing to wait for."""
        now = time.monotonic()
        is_due = now - self._at > (LINE_SECONDS if text == self._text else _CHANGE_SECONDS)
        if text and (is_due or not self._text):
            self._text, self._at = text, now
            logger.info("%s", text)


def unreachable(error: Exception) -> str:
    """Why an address cannot be used, in words that say what to look at.

    Args:
        error: of a socket, `OSError` or `UnicodeError`.
    """
    if isinstance(error, (socket.gaierror, UnicodeError)):
        return f"unknown host ({getattr(error, 'strerror', None) or error})"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused: nothing listens at this port yet, or a firewall closes it"
    if isinstance(error, TimeoutError):
        return "timed out: there is no machine at this address, or a firewall drops what is sent to it"
    return getattr(error, "strerror", None) or str(error)


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
