"""Messages from the first process of a tensor group to the others, which wait for them as long as it takes.

Not by collectives: gloo ends one after 30 seconds, on a card a process that waits in one keeps it busy, and a user may
think for an hour about the next question.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any, cast

from paddlemix.errors import OtherProcessError
from paddlemix.parallel.collectives import gathered_objects
from paddlemix.parallel.layout import Layout

_KEY_BYTES = 32
_CLOSING = 1.0  # seconds within which the connections of one that has ended are all closed


class Channel:
    """One end of it.

    Args:
        connections: of the first process to each other one; of the others to the first.
    """

    def __init__(self, connections: list[Connection]) -> None:
        self._connections = connections
        for connection in connections:
            # Nobody answers, and TCP would keep a message back until the last one is acknowledged, up to 40 ms later.
            with socket.socket(fileno=os.dup(connection.fileno())) as same:
                same.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: Any) -> None:
        """Tells every other process; the message is pickled between processes of the same run.

        Raises:
            OtherProcessError: one of them has ended.
        """
        for connection in self._connections:
            try:
                connection.send(message)
            except OSError as error:
                raise self._ended(connection) from error

    def messages(self) -> Iterator[Any]:
        """What the first process tells, until it closes the channel or is gone."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                yield self._connections[0].recv()

    def report_ready(self) -> None:
        """Tells the first process that it need not wait for this one any more; see `wait_for_others`."""
        with contextlib.suppress(OSError):  # it has ended meanwhile, as by Ctrl-C: so do the messages
            self._connections[0].send(None)

    def wait_for_others(self) -> None:
        """Returns on the first process when every other one has called `report_ready`, however late that is.

        Raises:
            OtherProcessError: one of them has ended instead.
        """
        waiting = list(self._connections)
        while waiting:  # for all at once: who has ended is not noticed only after one that reads a large model
            for connection in cast("list[Connection]", wait(waiting)):
                waiting.remove(connection)
                try:
                    connection.recv()
                except (EOFError, OSError) as error:
                    raise self._ended(connection) from error

    def check_others(self) -> None:
        """For the first process, after a computation with the others has failed; all have reported before.

        Raises:
            OtherProcessError: one of them has ended, which is why.
        """
        # They send nothing any more: what can be read is the end.
        closed = wait(self._connections, _CLOSING)
        if closed:
            raise self._ended(cast(Connection, closed[0]))

    def close(self) -> None:
        """Ends the messages."""
        for connection in self._connections:
            connection.close()

    def _ended(self, connection: Connection) -> OtherProcessError:
        number = self._connections.index(connection) + 1
        return OtherProcessError(f"process {number} of those that answer together has ended")


def open_channel(layout: Layout) -> Channel:
    """Connects the processes of each tensor group; called by all processes of the run.

    Args:
        layout: with a tensor group.

    Returns:
        The end of this process.
    """
    # The first process of each group says where it listens, and by which key it knows the others.
    with contextlib.ExitStack() as stack:
        place = None
        if layout.tensor_rank == 0:
            key = secrets.token_bytes(_KEY_BYTES)
            backlog = layout.tensor_degree
            listener = stack.enter_context(Listener((_own_host(), 0), backlog=backlog, authkey=key))
            place = (listener.address, key)
        found = gathered_objects(place)[layout.rank - layout.tensor_rank]
        if layout.tensor_rank == 0:
            # They connect in any order; each says who it is.
            others = {}
            for connection in (listener.accept() for _ in range(layout.tensor_degree - 1)):
                others[connection.recv()] = connection
            return Channel([others[rank] for rank in sorted(others)])
    connection = Client(found[0], authkey=found[1])
    connection.send(layout.tensor_rank)
    return Channel([connection])


def _own_host() -> str:
    """Address at which the other processes of the run reach this one."""
    # Source: paddle.distributed.launch, controllers/collective.py
    return os.environ.get("PADDLE_CURRENT_ENDPOINT", "127.0.0.1:0").rpartition(":")[0]
