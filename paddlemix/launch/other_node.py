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
from paddlemix.launch.meeting import JOIN_SECONDS, RETRY_SECONDS, Meeting, WaitingLines, unreachable
from paddlemix.launch.nodes import Message
from paddlemix.launch.worker_environment import Places
from paddlemix.log import logger

_CONNECT_SECONDS = 1.0  # signals wait as long
_ANSWER_SECONDS = 3.0  # for the first machine to answer, before anything is said about it
_VERDICT_SECONDS = 10.0  # for the first machine to say which failure came first


class OtherNode(Meeting):
    """Joins the run at the first machine, and follows what it decides."""

    _channel: Channel | None = None
    _told_at: float | None = None
    _tried_at = -RETRY_SECONDS  # to connect
    _greeted_at: float | None = None  # over this connection, for the next start
    _is_welcome = False
    _reason = ""  # why there is no connection
    _is_ended = False

    @property
    def is_waiting(self) -> bool:  # type: ignore[override]
        """Whether this machine is done and others may not be."""
        return self._is_done and not self._is_ended and not self._is_decided

    def gather(self, signals: Signals) -> Places:
        self._is_done = self._is_decided = self._is_ended = False
        self._told_at, self._messages = None, []
        self._greeted_at, self._is_welcome = None, False
        begin, lines = time.monotonic(), WaitingLines()
        logger.info("joining the run at %s:%d", *self._master)
        started: list[Mapping[str, Any]] = []
        while not started:
            self._greet()
            channel = self._channel
            readers = {} if channel is None else {channel.fileno(): lambda: self._read_start(started)}
            self._wait(signals, readers, RETRY_SECONDS, self.tell_stop)
            if started:
                break
            missing = self._missing()
            lines.tell(missing and f"waiting for the run at {self._master[0]}:{self._master[1]}: {missing}")
            if time.monotonic() - begin > JOIN_SECONDS:
                raise UserError(
                    f"the run at {self._master[0]}:{self._master[1]} did not begin within {JOIN_SECONDS / 60:.0f} "
                    f"minutes: {missing}; start the same command on every machine"
                )
        start = started[0]
        self.node = int(start["node"])
        return Places(start["store"], start["endpoints"])

    def _greet(self) -> None:
        """Connects where that is left to do, at most once in `RETRY_SECONDS`, and says who this is."""
        now = time.monotonic()
        if self._channel is None:
            if now - self._tried_at < RETRY_SECONDS:  # else what closes each connection at once is asked without end
                return
            self._tried_at, self._greeted_at = now, None
            try:
                self._channel = Channel(socket.create_connection(self._master, timeout=_CONNECT_SECONDS))
            except (OSError, UnicodeError) as error:  # it has not begun yet, or never will
                self._reason = unreachable(error)
                return
        if self._greeted_at is None:
            self._greeted_at = now
            self._channel.send(hello=self._hello())

    def _missing(self) -> str:
        """Why the run does not begin, as far as that is known here; "" for a moment after each connection."""
        if self._channel is None:
            return self._reason
        if self._greeted_at is None or time.monotonic() - self._greeted_at < _ANSWER_SECONDS:
            return ""
        if self._is_welcome:
            return "the first machine is there, others are not yet"
        return (
            "connected, but not answered: the first machine is still busy with a start of the run, or another program "
            "uses this port there"
        )

    def _read_start(self, started: list[Mapping[str, Any]]) -> None:
        assert self._channel is not None
        for message in self._channel.receive():
            if "refused" in message:
                raise UserError(f"the first machine refuses this one: {message['refused']}")
            if "stop" in message:
                raise Stopped(int(message["stop"]))
            self._is_welcome |= "welcome" in message
            if "start" in message:
                started.append(message["start"])
        if not self._channel.is_open:
            self._channel = None
            self._reason = (
                "the launcher there has ended"
                if self._is_welcome
                else "the connection was closed: what listens there is another program, or a launcher that has ended"
            )

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
