"""A connection between two launchers: lines of JSON, nothing that could run code."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any

_LONGEST = 1 << 20  # bytes of a line; thousands of endpoints fit
_SEND_SECONDS = 10.0
# A machine that loses its power says nothing: the system asks it 3 times, 10 seconds apart, after 30 of silence.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}


class Channel:
    """One end of it.

    Attributes:
        is_open: False when the other end is gone, or what it sends is not ours.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._rest = connection, b""
        self.is_open = True
        connection.settimeout(_SEND_SECONDS)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):  # not on every system
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    @property
    def own_address(self) -> str:
        """Of this machine, as the other one reaches it."""
        return str(self._socket.getsockname()[0])

    @property
    def other_address(self) -> str:
        """Of the other machine."""
        return str(self._socket.getpeername()[0])

    def fileno(self) -> int:
        """Of the connection."""
        return self._socket.fileno()

    def send(self, **values: Any) -> None:
        """Sends one message; if the other end is gone, reading shows it."""
        with contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(values).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come, called when there is something to read."""
        try:
            data = self._socket.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            data = b""
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            found = [json.loads(line) for line in lines]
        except ValueError:
            found, data = [], b""
        # A scanner of ports, or a browser, speaks another language.
        if not data or len(self._rest) > _LONGEST or not all(isinstance(item, dict) for item in found):
            self.close()
            return [item for item in found if isinstance(item, dict)]
        return found

    def close(self) -> None:
        """Ends it."""
        self.is_open = False
        self._socket.close()
