"""HTTP connections that never reach the local network unasked and never outlive a deadline.

A name's addresses are looked up once, all of them are checked, and the connection goes to a checked address: a name
that changes its address in between gains nothing.  A timer closes whatever is still open at the deadline, however
slowly the server sends, headers included.  Knows no file and no cache.
"""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from types import TracebackType
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import NewConnectionError

from paddlemix import __version__
from paddlemix.network.addresses import is_local, refusal


class Deadline:
    """The time by which everything is over; a context that closes its connections then.

    Args:
        seconds: from now, above 0; `math.inf` for no end.
        pace: seconds within which `step` must be called, again and again; else it is over, too.

    Attributes:
        stalled: it was over for want of a `step`.
    """

    def __init__(self, seconds: float, pace: float) -> None:
        self.stalled = False
        self._pace = pace
        self._end = time.monotonic() + seconds
        self._next = time.monotonic() + pace
        # closed from another thread: a blocked read has no other way out, and requests' own timeout starts anew with
        # each byte
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._wait, name="deadline", daemon=True)

    @property
    def remaining(self) -> float:
        """Seconds, 0 once it is over."""
        return 0.0 if self.stalled else max(self._end - time.monotonic(), 0.0)

    def step(self, pause: float = 0.0) -> None:
        """Notes progress; a pause of `pause` seconds may follow."""
        self._next = time.monotonic() + pause + self._pace

    def renew(self) -> bool:
        """Begins again after a stall, where no end is set; returns whether it did."""
        if self._end != math.inf:
            return False
        self._thread.join()  # it has ended, or is about to
        self.stalled = False
        self.step()
        self._thread = threading.Thread(target=self._wait, name="deadline", daemon=True)
        self._thread.start()
        return True

    def watch(self, connection: socket.socket) -> socket.socket:
        """Adds a connection and returns it.  A copy is kept, because TLS replaces the original."""
        with self._lock:
            self._sockets.append(connection.dup())
        if not self.remaining:
            self._close()
        return connection

    def _wait(self) -> None:
        while not self._left.wait(max(min(self._end, self._next) - time.monotonic(), 0.0)):
            now = time.monotonic()
            self.stalled = self._next <= now < self._end
            if self.stalled or self._end <= now:
                self._close()
                return

    def _close(self) -> None:
        with self._lock:
            for copy in self._sockets:
                with contextlib.suppress(OSError):
                    copy.shutdown(socket.SHUT_RDWR)  # wakes whoever waits for its next byte

    def __enter__(self) -> Deadline:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        with self._lock:
            for copy in self._sockets:
                copy.close()
            self._sockets.clear()


def open_session(deadline: Deadline, allow_local_network: bool) -> requests.Session:
    """A session whose connections end at a deadline and go to public addresses only.

    Proxies named by the environment (`HTTPS_PROXY`, `NO_PROXY`, ...) are used.  The proxy's own address is the user's
    choice and may be local; it looks names up itself, so only `check_literal` guards what it is asked for.

    Args:
        deadline: see `Deadline`; connections through a SOCKS proxy are not closed by it.
        allow_local_network: no address is refused.
    """
    session = _Session()
    session.headers.update({"User-Agent": f"paddlemix/{__version__}", "Accept-Encoding": "identity"})
    adapter = _Adapter(deadline, allow_local_network)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


class _Session(requests.Session):
    """Sees no redirects: requests would look ahead at each, and read its body to the end."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        return None


class _Guarded(HTTPConnection):
    """What the connections of a session share; `deadline` and `allow_local_network` are set per session."""

    deadline: Deadline
    allow_local_network: bool

    def _new_conn(self) -> socket.socket:
        # through a proxy, which looks names up -> connected as it is
        # local network allowed                 -> connected as it is
        # else                                  -> every address of the name is checked, then connected to by number
        if self.proxy is not None or self.allow_local_network:
            return self._connect()
        name, failure = self._dns_host, None
        try:
            for address in self._addresses(name):
                # The socket goes to this address, while `host`, which TLS verifies, stays the name.
                self._dns_host = address
                try:
                    return self._connect()
                except NewConnectionError as error:
                    failure = error
        finally:
            self._dns_host = name  # TLS verifies the name
        raise failure or NewConnectionError(self, f"{name} has no address")

    def _connect(self) -> socket.socket:
        if isinstance(self.timeout, (int, float)):
            self.timeout = max(min(self.timeout, self.deadline.remaining), 0.01)
        return self.deadline.watch(super()._new_conn())

    def _addresses(self, name: str) -> list[str]:
        host = name.strip("[]").rstrip(".")
        try:
            found = socket.getaddrinfo(host, self.port, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as error:
            raise NewConnectionError(self, f"{host} has no address: {error}") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        # one local address among public ones is enough to refuse: which of them is used is not ours to choose
        for address in addresses:
            if is_local(address):
                raise refusal(host, address)
        return addresses


class _Adapter(HTTPAdapter):
    """Makes the guarded connections, direct ones and those to a proxy."""

    def __init__(self, deadline: Deadline, allow_local_network: bool) -> None:
        guard = {"deadline": deadline, "allow_local_network": allow_local_network}
        # urllib3 makes connections from a class: values of one session have to be attributes of a class of its own
        plain = type("_PlainConnection", (_Guarded,), guard)
        secure = type("_SecureConnection", (_Guarded, HTTPSConnection), guard)
        self._pools: dict[str, Any] = {
            "http": type("_PlainPool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
            "https": type("_SecurePool", (HTTPSConnectionPool,), {"ConnectionCls": secure}),
        }
        super().__init__()

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **options)
        if not proxy.lower().startswith("socks"):  # these need connections of their own
            manager.pool_classes_by_scheme = self._pools
        return manager
