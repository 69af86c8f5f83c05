"""The launcher of a machine that is not the first."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from typing import Any

from paddlemix.errors import Stopped, UserError
from paddlemix.launch.channel import Channel
from paddlemix.launch.events import Readers, Signals
from paddlemix.launch.first_failure import Failure
from paddlemix.launch.meeting import JOIN_SECONDS, RETRY_SECONDS, Meeting
from paddlemix.launch.nodes import Message
from paddlemix.launch.worker_environment import Places
from paddlemix.log import logger

_VERDICT_SECONDS = 10.0  # for the first machine to say which failure came first


class OtherNode(Meeting):
    """Joins the run at the first machine, and follows what it decides."""

    _channel: Channel | None = None
    _told_at: float | None = None
    _is_ended = False

    @property
    def is_waiting(self) -> bool:  # type: ignore[override]
        """Whether this machine is done and others may not be."""
        return self._is_done and not self._is_ended and not self._is_decided

    def gather(self, signals: Signals) -> Places:
        self._is_done = self._is_decided = self._is_ended = False
        self._told_at, self._messages = None, []
        begin = time.monotonic()
        logger.info("joining the run at %s:%d", *self._master)
        started: list[Mapping[str, Any]] = []
        is_told = False
        while not started:
            if self._channel is None:
                self._channel, is_told = self._connected(), False
            if self._channel is not None and not is_told:
                self._channel.send(hello=self._hello())
                is_told = True
            channel = self._channel
            readers = {} if channel is None else {channel.fileno(): lambda: self._read_start(started)}
            self._wait(signals, readers, RETRY_SECONDS, self.tell_stop)
            if time.monotonic() - begin > JOIN_SECONDS:
                raise UserError(
                    f"the run at {self._master[0]}:{self._master[1]} did not begin within "
                    f"{JOIN_SECONDS / 60:.0f} minutes; start the same command on every machine"
                )
        start = started[0]
        self.node = int(start["node"])
        return Places(start["store"], start["endpoints"])

    def _connected(self) -> Channel | None:
        try:
            return Channel(socket.create_connection(self._master, timeout=RETRY_SECONDS))
        except OSError:  # it has not begun yet
            return None

    def _read_start(self, started: list[Mapping[str, Any]]) -> None:
        assert self._channel is not None
        for message in self._channel.receive():
            if "refused" in message:
                raise UserError(f"the first machine refuses this one: {message['refused']}")
            if "stop" in message:
                raise Stopped(int(message["stop"]))
            if "start" in message:
                started.append(message["start"])
        if not self._channel.is_open:
            self._channel = None

    def readers(self) -> Readers:
        return {} if self._channel is None else {self._channel.fileno(): self._read}

    def _read(self) -> None:
        assert self._channel is not None
        for message in self._channel.receive():
            if "stop" in message:
                self._messages.append(Message(stop=int(message["stop"])))
            elif "failed" in message:
                self._is_decided = True
                failure = Failure.from_message(message["failed"])
                self._messages.append(Message(None, failure, is_decided=True, is_again=bool(message["again"])))
            elif "end" in message:
                self._is_ended = True
        if not self._channel.is_open:
            self._channel = None
            if not (self._is_ended or self._is_decided):
                self._is_decided = True
                text = f"the first machine ({self._master[0]}) is gone: its launcher has ended, or the network to it"
                failure = Failure(time.time(), 1, message=text)
                self._messages.append(Message(None, failure, is_decided=True))

    def tell_stop(self, number: int) -> None:
        if self._channel is not None:
            self._channel.send(stop=number)

    def tell_done(self) -> None:
        if not self._is_done and self._channel is not None:
            self._is_done = True
            self._channel.send(done=True)

    def decide(self, failure: Failure, may_restart: bool) -> tuple[Failure, bool] | None:
        if self._told_at is None and self._channel is not None:
            self._told_at = time.monotonic()
            self._channel.send(failed=failure.to_message())
            return None
        # The first machine's word comes as a message.
        waited = time.monotonic() - (self._told_at or 0)
        return (failure, False) if self._channel is None or waited > _VERDICT_SECONDS else None

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
