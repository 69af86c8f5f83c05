"""An http(s) address -> a file in the cache, fetched once.

Slow, endless, redirecting and failing servers each end in one error within a bounded time; what arrives whole is kept
under the address's own name.  Knows nothing of what the files hold.
"""

from __future__ import annotations

import json
import random
import re
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urldefrag, urljoin, urlsplit

import requests
from filelock import FileLock, Timeout
from urllib3.exceptions import HTTPError

from paddlemix.cache import cache_directory, cache_key, replacing
from paddlemix.errors import UserError
from paddlemix.network.connections import Deadline, LocalAddressError, check_literal, open_session
from paddlemix.network.failures import plain_cause
from paddlemix.network.switches import offline_switch

_REDIRECTS = (301, 302, 303, 307, 308)
_FIRST_WAIT = 0.5  # seconds before the second attempt, doubled before each further one
_LONGEST_WAIT = 60.0  # seconds, also where the server's Retry-After asks for more
_CHUNK = 1 << 16  # bytes
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
        deadline: seconds for all attempts together; None for four times `timeout`.
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


class _PassingError(Exception):
    """An attempt failed in a way that may pass; `wait` is what the server asks for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def cached(url: str) -> Path | None:
    """The file of an address that was fetched before, or None."""
    path = _place(url)
    return path if path.is_file() else None


def content_type(url: str) -> str:
    """What the server called the content of a cached address, e.g. "image/png"; "" where that is not known."""
    try:
        return str(json.loads(_place(url).with_suffix(".json").read_text(encoding="utf-8"))["content_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def discard(url: str) -> None:
    """Takes an address out of the cache, so that the next `fetch` asks its server again."""
    for path in (_place(url), _place(url).with_suffix(".json")):
        path.unlink(missing_ok=True)


def _place(url: str) -> Path:
    key = cache_key(urldefrag(url).url)
    return cache_directory("downloads") / key[:2] / f"{key}.bin"


def fetch(url: str, settings: RemoteSettings | None = None) -> Path:
    """The file behind an address, from the cache or from its server.

    Several processes that want the same address wait for the first of them; each hop of a redirect is checked like the
    first address.  With a proxy (`HTTPS_PROXY`) only addresses written as numbers can be refused as local: names are
    looked up by the proxy.

    Args:
        url: http or https.
        settings: limits; None for the defaults.

    Returns:
        A file that must not be changed.

    Raises:
        UserError: begins with the quoted address: not http(s), offline and not cached, refused, no answer, too large,
            too slow, too many redirects, or the cache cannot be written.
    """
    found = cached(url)
    if found is not None:
        return found
    settings = settings or RemoteSettings()
    try:
        _check_address(url, settings)
    except UserError as error:
        raise UserError(f"'{url}' cannot be fetched: {error}") from error
    switch = offline_switch(settings.offline)
    if switch is not None:
        raise UserError(f"'{url}' is not in the cache, and {switch} forbids to ask its server")
    path = _place(url)
    try:
        path.parent.mkdir(exist_ok=True)
        lock = path.with_suffix(".lock")
        try:
            with FileLock(lock, timeout=settings.seconds):
                return cached(url) or _Download(url, path, settings).run()
        finally:
            lock.unlink(missing_ok=True)
    except Timeout as error:
        raise UserError(
            f"'{url}' cannot be fetched: another process has not finished with it in {settings.seconds:g} s"
        ) from error
    except OSError as error:
        raise UserError(f"'{url}' cannot be kept in {path.parent}: {error}; set PADDLEMIX_CACHE") from error


def _check_address(url: str, settings: RemoteSettings) -> None:
    """Refuses what is no http(s) address with a host, and a local one where that is not allowed."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"not an address: {error}") from error
    if parts.scheme not in ("http", "https"):
        raise UserError(f"the scheme '{parts.scheme}' is neither http nor https")
    if not host:
        raise UserError("it names no host")
    if not settings.allow_local_network:
        check_literal(url)


class _Download:
    """All attempts at one address: until one succeeds, none is left or the time is over."""

    def __init__(self, url: str, path: Path, settings: RemoteSettings) -> None:
        self._url, self._path, self._settings = url, path, settings
        self._deadline = Deadline(settings.seconds, settings.timeout * 4)

    def run(self) -> Path:
        """Gives the file, or raises as `fetch` does."""
        with self._deadline, open_session(self._deadline, self._settings.allow_local_network) as session:
            attempt = 0
            while True:
                try:
                    return self._attempt(session)
                except _PassingError as error:
                    wait = self._wait(attempt, error)
                    self._deadline.step(wait)
                    _sleep(wait)
                    attempt += 1

    def _wait(self, attempt: int, error: _PassingError) -> float:
        """Seconds before the attempt after this one, if there is to be one."""
        backoff = _FIRST_WAIT * 2**attempt * _random.uniform(0.5, 1.5)
        wait = min(backoff if error.wait is None else error.wait, _LONGEST_WAIT)
        if self._deadline.stalled:
            raise self._error(f"less than 64 KiB came in {self._settings.timeout * 4:g} s") from error
        if not self._deadline.remaining:
            raise self._error(f"it has not arrived whole after {self._settings.seconds:g} s") from error
        if attempt >= self._settings.retries or wait >= self._deadline.remaining:
            raise self._error(f"{error} (attempt {attempt + 1})") from error
        return wait

    def _error(self, reason: object) -> UserError:
        return UserError(f"'{self._url}' cannot be fetched: {reason}")

    def _attempt(self, session: requests.Session) -> Path:
        address = self._url
        for _ in range(self._settings.max_redirects + 1):
            with self._request(session, address) as response:
                target = response.headers.get("Location") if response.status_code in _REDIRECTS else None
                if target is None:
                    return self._receive(response)
            try:
                address = urljoin(address, target)
                _check_address(address, self._settings)
            except ValueError as error:  # a UserError too
                raise self._error(f"its server redirects to '{target}': {error}") from error
        raise self._error(f"it redirects more than {self._settings.max_redirects} times")

    def _request(self, session: requests.Session, address: str) -> requests.Response:
        self._deadline.step()
        try:
            return session.get(address, stream=True, allow_redirects=False, timeout=self._settings.timeout)
        except LocalAddressError as error:
            hop = "" if address == self._url else f"its server redirects to '{address}': "
            raise self._error(f"{hop}{error}") from error
        except (requests.exceptions.SSLError, requests.exceptions.InvalidURL) as error:
            raise (_PassingError if not self._deadline.remaining else self._error)(plain_cause(error)) from error
        except (requests.RequestException, HTTPError, OSError) as error:
            raise _PassingError(plain_cause(error)) from error
        except ValueError as error:  # e.g. a host that can be no name
            raise self._error(error) from error

    def _receive(self, response: requests.Response) -> Path:
        """Writes the body of an answer into the cache, and beside it what the server calls it."""
        reason = f"{response.status_code} {response.reason or ''}".rstrip()
        if response.status_code == 429 or response.status_code >= 500:
            raise _PassingError(reason, _retry_after(response.headers.get("Retry-After", "")))
        if response.status_code != 200:
            raise self._error(reason)
        length = response.headers.get("Content-Length", "")
        size = int(length) if length.isdecimal() else 0
        self._check_size(size)
        kind = response.headers.get("Content-Type", "").split(";")[0].strip().lower()
        with replacing(self._path) as part:
            with open(part, "wb") as file:
                self._write(response, file)
            arrived = response.raw.tell()  # bytes over the wire, before any decoding
            if arrived < size or not self._deadline.remaining:  # closed by the deadline, it looks like an end
                raise _PassingError(f"the connection ended after {arrived:,} of {size:,} bytes")
            with replacing(self._path.with_suffix(".json")) as note:
                note.write_text(json.dumps({"url": self._url, "content_type": kind}), encoding="utf-8")
        return self._path

    def _write(self, response: requests.Response, file: BinaryIO) -> None:
        written = 0
        chunks = response.iter_content(_CHUNK)
        while True:
            self._deadline.step()
            try:
                chunk = next(chunks, None)
            except (requests.RequestException, HTTPError, OSError) as error:
                raise _PassingError(plain_cause(error)) from error
            if chunk is None:
                return
            written += len(chunk)
            self._check_size(written)
            file.write(chunk)

    def _check_size(self, size: int) -> None:
        limit = self._settings.max_bytes
        if size > limit:
            shown = f"{limit >> 20} MiB" if limit >= 1 << 20 else f"{limit} bytes"
            raise UserError(f"'{self._url}' is larger than {shown} ({self._settings.limit_name}={limit})")


def _retry_after(value: str) -> float | None:
    """Seconds of a Retry-After header, which are a number or a date; None where it says neither."""
    if re.fullmatch(r"\s*\d{1,9}\s*", value):
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except (ValueError, TypeError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return max((moment - datetime.now(timezone.utc)).total_seconds(), 0.0)
