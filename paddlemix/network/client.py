"""Asking servers: attempts, redirects hop by hop, limits of time and size; one core for images, data and models.

Knows no file and no cache.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeVar
from urllib.parse import urljoin

import requests
from urllib3.exceptions import HTTPError

from paddlemix.errors import UserError, without_secrets
from paddlemix.network.addresses import LocalAddressError, check_address, origin
from paddlemix.network.connections import Deadline, open_session
from paddlemix.network.failures import PassingError, UnreachableError, may_pass, plain_cause, retry_after

Result = TypeVar("Result")

_REDIRECTS = (301, 302, 303, 307, 308)
_FIRST_WAIT = 0.5  # seconds before the second attempt, doubled before each further one
_LONGEST_WAIT = 60.0  # seconds, also where the server's Retry-After asks for more
_CHUNK = 1 << 16  # bytes
_LONGEST_LENGTH = 18  # digits of a Content-Length that is believed
_random = random.SystemRandom()  # leaves the run's own random numbers alone
_sleep = time.sleep


@dataclass(frozen=True, kw_only=True)
class RemoteSettings:
    """Limits of a download.

    Args:
        timeout: seconds to connect, and between bytes, above 0; four of them are the most for any 64 KiB.
        retries: further attempts after a connection that failed or a status that may pass, >= 0.
        max_bytes: largest file.
        max_redirects: hops from the first address to the file.
        allow_local_network: addresses of this machine and its network may be asked.
        offline: only what is in the cache is used; None leaves it to PADDLEMIX_OFFLINE and HF_HUB_OFFLINE.
        deadline: seconds for all attempts together, `math.inf` for no limit; None for four times `timeout`.
        limit_name: what the user calls `max_bytes`, for the error.
    """

    timeout: float = 30.0
    retries: int = 3
    max_bytes: int = 64 * 1024**2
    max_redirects: int = 5
    allow_local_network: bool = False
    offline: bool | None = None
    deadline: float | None = None
    limit_name: str = "max_bytes"

    @property
    def seconds(self) -> float:
        """For all attempts together."""
        return self.timeout * 4 if self.deadline is None else self.deadline


@dataclass(frozen=True)
class Secret:
    """Headers that prove who asks; they are sent to one origin and to no other, whatever it redirects to.

    Args:
        url: any address of the origin.
        headers: e.g. {"Authorization": "Bearer ..."}.
    """

    url: str
    headers: Mapping[str, str] = field(repr=False)

    def for_address(self, url: str) -> Mapping[str, str]:
        """The headers for a request to an address."""
        return self.headers if origin(url) == origin(self.url) else {}


class Client:
    """A context in which servers are asked; all its connections are closed at its end.

    Args:
        settings: the limits.
        secret: see `Secret`.
    """

    def __init__(self, settings: RemoteSettings, secret: Secret | None = None) -> None:
        self.settings = settings
        self._secret = secret
        self._deadline = Deadline(settings.seconds, settings.timeout * 4)

    def __enter__(self) -> Client:
        self._deadline.__enter__()
        self._session = open_session(self._deadline, self.settings.allow_local_network)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.close()
        self._deadline.__exit__(kind, error, trace)

    @property
    def is_over(self) -> bool:
        """Whether the time is: what looks like the end of an answer may be the deadline's closing it."""
        return not self._deadline.remaining

    def repeat(self, attempt: Callable[[], Result], received: Callable[[], int] = lambda: 0) -> Result:
        """Calls `attempt` until it succeeds, no attempt is left or the time is over.

        Args:
            attempt: raises `PassingError` where another attempt may succeed.
            received: bytes that attempts have gained so far; after a gain all attempts are left again.

        Raises:
            UnreachableError: the last attempt's reason; what else `attempt` raises passes.
        """
        failures = 0
        while True:
            before = received()
            try:
                return attempt()
            except PassingError as error:
                # a connection that breaks every gigabyte still finishes; one that brings nothing ends
                failures = 0 if received() > before else failures
                wait = self._wait(failures, error)
                self._deadline.step(wait)
                _sleep(wait)
                failures += 1

    def _wait(self, failures: int, error: PassingError) -> float:
        """Seconds before the attempt after this one, if there is to be one."""
        settings, reason = self.settings, str(error)
        # the server's own word counts, up to a minute
        wait = backoff(failures) if error.wait is None else min(error.wait, _LONGEST_WAIT)
        if self._deadline.stalled:
            reason = f"less than 64 KiB came in {settings.timeout * 4:g} s"
            if not self._deadline.renew():
                raise UnreachableError(reason) from error
        if not self._deadline.remaining:
            raise UnreachableError(f"it was not complete after {settings.seconds:g} s") from error
        # waiting beyond the deadline would only make the same error later
        if failures >= settings.retries or wait >= self._deadline.remaining:
            raise UnreachableError(f"{reason} (attempt {failures + 1})") from error
        return wait

    def request(
        self, url: str, method: str = "GET", headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> requests.Response:
        """The answer at the end of all redirects; the caller closes it.

        Args:
            url: http or https, checked by the caller; every address that it redirects to is checked here.
            method: GET, HEAD or POST.
            headers: for every hop.
            body: what is sent; only the first address gets it.

        Returns:
            Of any status that will not pass; its body is not read yet.

        Raises:
            PassingError: no answer, or a status that may pass.
            UnreachableError: refused, or too many redirects; with a body, any.
        """
        address = url
        # status                  -> what follows
        # 301 .. 308 and a target -> the next hop, checked like the first address
        # one that may pass       -> another attempt
        # any other               -> returned, for the caller to judge
        for _ in range(self.settings.max_redirects + 1):
            response = self._ask(method, address, headers or {}, address == url, body)
            target = response.headers.get("Location") if response.status_code in _REDIRECTS else None
            if target is None:
                if may_pass(response.status_code):
                    response.close()
                    raise PassingError(status_of(response), retry_after(response.headers.get("Retry-After", "")))
                return response
            response.close()
            if body is not None:
                raise UnreachableError(
                    f"its server redirects to '{without_secrets(target)}'; name that address instead"
                )
            try:
                # followed hop by hop: requests would follow to the local network, and send secrets to whoever is named
                address = urljoin(address, target)
                check_address(address, self.settings.allow_local_network)
            except ValueError as error:  # a UserError too
                raise UnreachableError(f"its server redirects to '{without_secrets(target)}': {error}") from error
        raise UnreachableError(f"it redirects more than {self.settings.max_redirects} times")

    def _ask(
        self, method: str, address: str, headers: Mapping[str, str], is_first: bool, body: bytes | None
    ) -> requests.Response:
        self._deadline.step()
        secret = self._secret.for_address(address) if self._secret is not None else {}
        sent, auth = {**headers, **secret}, _as_it_is if secret else None  # else ~/.netrc would replace the header
        try:
            return self._session.request(
                method,
                address,
                headers=sent,
                data=body,
                auth=auth,
                stream=True,
                allow_redirects=False,
                timeout=self.settings.timeout,
            )
        except LocalAddressError as error:
            hop = "" if is_first else f"its server redirects to '{without_secrets(address)}': "
            raise UnreachableError(f"{hop}{error}") from error
        # A wrong certificate will not pass; but a deadline that closes the connection looks like one.
        except (requests.exceptions.SSLError, requests.exceptions.InvalidURL) as error:
            raise (UnreachableError if self._deadline.remaining else PassingError)(plain_cause(error)) from error
        except (requests.RequestException, HTTPError, OSError) as error:
            raise PassingError(plain_cause(error)) from error
        except ValueError as error:  # e.g. a host that can be no name
            raise UnreachableError(without_secrets(str(error))) from error

    def chunks(self, response: requests.Response) -> Iterator[bytes]:
        """The body of an answer, piece by piece.

        Raises:
            PassingError: the connection broke.
        """
        pieces = response.iter_content(_CHUNK)
        while True:
            self._deadline.step()
            try:
                piece = next(pieces, None)
            except (requests.RequestException, HTTPError, OSError) as error:
                raise PassingError(plain_cause(error)) from error
            if piece is None:
                return
            yield piece

    def check_size(self, size: int) -> None:
        """Raises a `UserError`, "is larger than ...", where a file has more bytes than allowed."""
        limit = self.settings.max_bytes
        if size > limit:
            shown = f"{limit >> 20} MiB" if limit >= 1 << 20 else f"{limit} bytes"
            raise TooLargeError(f"is larger than {shown} ({self.settings.limit_name}={limit})")


class TooLargeError(UserError):
    """A file has more bytes than allowed; the message continues the file's name."""


def backoff(failures: int) -> float:
    """Seconds to wait after this number of failures, longer each time and never the same for two programs."""
    return min(_FIRST_WAIT * 2**failures * _random.uniform(0.5, 1.5), _LONGEST_WAIT)


def status_of(response: requests.Response) -> str:
    """An answer's status in words, "404 Not Found"."""
    return f"{response.status_code} {response.reason or ''}".rstrip()


def length_of(response: requests.Response) -> int | None:
    """Bytes of an answer's body as its server announces them; None where it does not."""
    # a server may send anything here: a number of thousands of digits must not become an int
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() and len(length) <= _LONGEST_LENGTH else None


def _as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request
