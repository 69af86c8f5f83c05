"""The launcher where those of all machines meet."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from paddlemix.errors import UserError
from paddlemix.launch.cards import Cards
from paddlemix.launch.channel import Channel
from paddlemix.launch.events import Readers, Signals
from paddlemix.launch.first_failure import Failure
from paddlemix.launch.meeting import JOIN_SECONDS, LINE_SECONDS, RETRY_SECONDS, Meeting, unreachable
from paddlemix.launch.nodes import Message
from paddlemix.launch.options import LaunchOptions
from paddlemix.launch.worker_environment import Places
from paddlemix.log import logger

_LOOPBACK = "127."


def listen(master: tuple[str, int], must: bool) -> socket.socket | None:
    """A socket at the meeting place; None if it is another machine's, which is an error if this `must` be the first.

    Raises:
        UserError: the port is in use, needs a superuser or is not on this machine.
    """
    host, port = master
    reason = ""
    # The name of a service is no address of any machine, yet its connections arrive at the first one's port.
    for address in (host, "") if must else (host,):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
            listener.listen(128)
            if not address:
                logger.info("%s is not an address of this machine (%s): listening on all that it has", host, reason)
            return listener
        except (OSError, UnicodeError) as error:
            listener.close()
            reason = unreachable(error)
            number = getattr(error, "errno", None)
            # Both are of this machine's own address alone.
            if number == errno.EACCES:
                raise UserError(f"--master {host}:{port}: only a superuser may use this port; choose another") from None
            if number == errno.EADDRINUSE and must:
                raise UserError(f"--master {host}:{port}: the port is in use on this machine; choose another") from None
            if number == errno.EADDRINUSE:  # usually by another launcher of the run, on the same machine
                logger.info("port %d of this machine is in use: joining whoever has it as another machine", port)
    if must:
        raise UserError(f"--master {host}:{port} cannot be used on the machine of --rank 0 ({reason})")
    return None


class FirstNode(Meeting):
    """The launcher where all meet.

    Args:
        listener: at the meeting place.
    """

    def __init__(
        self, options: LaunchOptions, cards: Cards, environment: Mapping[str, str], listener: socket.socket
    ) -> None:
        super().__init__(options, cards, environment)
        self._listener = listener
        self._new: list[Channel] = []  # connected, and not yet heard
        self._others: dict[int, Channel] = {}
        self._hellos: dict[int, dict[str, Any]] = {}
        self._done: set[int] = set()

    @property
    def is_waiting(self) -> bool:  # type: ignore[override]
        """Whether this machine is done and another is not."""
        return self._is_done and not self._is_decided and not self._done >= set(self._others)

    def gather(self, signals: Signals) -> Places:
        own = self._hello()
        # Not the greetings: after a failure another machine may have come to the next start before this one.
        self._is_done = self._is_decided = False
        begin = line = time.monotonic()
        logger.info("waiting at %s:%d for %d other machines", *self._master, self._options.nodes - 1)
        while len(self._hellos) < self._options.nodes - 1:
            channels = [*self._new, *self._others.values()]
            readers = {channel.fileno(): self._reader(channel) for channel in channels}
            self._wait(signals, readers | {self._listener.fileno(): self._accept}, RETRY_SECONDS, self.tell_stop)
            now = time.monotonic()
            missing = sorted(set(range(1, self._options.nodes)) - set(self._hellos))
            if now - begin > JOIN_SECONDS:
                raise UserError(
                    f"{len(missing)} of {self._options.nodes} machines did not come to {self._master[0]}:"
                    f"{self._master[1]} within {JOIN_SECONDS / 60:.0f} minutes; start the same command on each"
                )
            if missing and now - line > LINE_SECONDS:
                line = now
                logger.info("still waiting for machines %s", ", ".join(map(str, missing)))
        places = self._places(own)
        # What was said about the start before is over.
        self._done, self._messages, self._hellos = set(), [], {}
        for node, channel in self._others.items():
            channel.send(start={"node": node, "store": places.store, "endpoints": places.endpoints})
        return places

    def _places(self, own: Mapping[str, Any]) -> Places:
        # As the others reach this machine; one that is on the same machine came by the loopback, which others cannot.
        addresses = sorted((channel.own_address for channel in self._others.values()), key=_is_loopback)
        first = addresses[0]
        hosts = {0: first} | {
            node: first if _is_loopback(channel.other_address) else channel.other_address
            for node, channel in self._others.items()
        }
        ports = {0: own["ports"]} | {node: hello["ports"] for node, hello in self._hellos.items()}
        endpoints = [[f"{hosts[node]}:{port}" for port in ports[node][:-1]] for node in sorted(ports)]
        return Places(f"{first}:{own['ports'][-1]}", endpoints)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        self._new.append(Channel(connection))

    def _reader(self, channel: Channel) -> Callable[[], None]:
        def read() -> None:
            for message in channel.receive():
                try:
                    self._heard(channel, message)
                except (AttributeError, KeyError, TypeError, ValueError):  # not one of ours
                    channel.close()
            if not channel.is_open:
                self._lost(channel)

        return read

    def _heard(self, channel: Channel, message: Mapping[str, Any]) -> None:
        node = self._node_of(channel)
        if "hello" in message:
            self._welcome(channel, node, message["hello"])
        elif node is None:
            channel.close()
        elif "stop" in message:
            self._messages.append(Message(stop=int(message["stop"])))
            self._tell_others(node, stop=message["stop"])
        elif "failed" in message:
            self._messages.append(Message(failure=Failure.from_message(message["failed"])))
        elif "done" in message:
            self._done.add(node)
            self._end_if_all_done()

    def _node_of(self, channel: Channel) -> int | None:
        return next((node for node, other in self._others.items() if other is channel), None)

    def _welcome(self, channel: Channel, known: int | None, hello: Mapping[str, Any]) -> None:
        taken = set(self._others) - {known}
        free = [node for node in range(1, self._options.nodes) if node not in taken]
        wanted = known if known is not None else hello.get("node")
        refusal = ""
        if hello.get("nodes") != self._options.nodes:
            refusal = f"--nnodes is {hello.get('nodes')} there and {self._options.nodes} on the first machine"
        elif hello.get("kind") != self._cards.kind:
            refusal = f"it computes on {hello.get('kind')}, the first machine on {self._cards.kind}"
        elif wanted in taken or wanted == 0:
            refusal = f"--rank {wanted} is another machine's; give each its own"
        elif not free:
            refusal = f"{self._options.nodes} machines are here already; a job of another name may use the same port"
        if refusal:
            channel.send(refused=refusal)
            channel.close()
            return
        node = free[0] if wanted is None else int(wanted)
        self._new = [other for other in self._new if other is not channel]
        self._others[node], self._hellos[node] = channel, dict(hello)
        channel.send(welcome=node)

    def _lost(self, channel: Channel) -> None:
        self._new = [other for other in self._new if other is not channel]
        node = self._node_of(channel)
        if node is None:
            return
        del self._others[node]
        self._hellos.pop(node, None)
        if node not in self._done:
            text = f"machine {node} is gone: its launcher has ended, or the network to it"
            self._messages.append(Message(failure=Failure(time.time(), 1, message=text)))

    def readers(self) -> Readers:
        return {channel.fileno(): self._reader(channel) for channel in self._others.values()}

    def tell_stop(self, number: int) -> None:
        self._tell_others(None, stop=number)

    def _tell_others(self, but: int | None, **values: Any) -> None:
        for node, channel in self._others.items():
            if node != but:
                channel.send(**values)

    def tell_done(self) -> None:
        self._is_done = True
        self._end_if_all_done()

    def _end_if_all_done(self) -> None:
        if self._is_done and self._done >= set(self._others) and not self._is_decided:
            self._tell_others(None, end=True)

    def decide(self, failure: Failure, may_restart: bool) -> tuple[Failure, bool] | None:
        is_again = may_restart and failure.is_crash
        self._is_decided = True
        self._tell_others(None, failed=failure.to_message(), again=is_again)
        return failure, is_again

    def close(self) -> None:
        for channel in (*self._new, *self._others.values()):
            channel.close()
        self._listener.close()


def _is_loopback(address: str) -> bool:
    return address.startswith(_LOOPBACK)
