"""An http(s) address -> a file in the cache, fetched once.

Slow, endless, redirecting and failing servers each end in one error within a bounded time; what arrives whole is kept
under the address's own name.  Knows nothing of what the files hold.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urldefrag

from filelock import FileLock, Timeout

from paddlemix.cache import cache_directory, cache_key, replacing
from paddlemix.errors import UserError, without_secrets
from paddlemix.network.addresses import check_address
from paddlemix.network.client import Client, RemoteSettings, TooLargeError, length_of, status_of
from paddlemix.network.failures import PassingError, UnreachableError
from paddlemix.network.switches import offline_switch


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
    # the query belongs to the address, the fragment never reaches a server
    key = cache_key(urldefrag(url).url)
    return cache_directory("downloads") / key[:2] / f"{key}.bin"


def fetch(url: str, settings: RemoteSettings | None = None) -> Path:
    """The file of an address, from the cache or from its server.

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
    settings, shown = settings or RemoteSettings(), without_secrets(url)
    try:
        check_address(url, settings.allow_local_network)
    except UserError as error:
        raise UserError(f"'{shown}' cannot be fetched: {error}") from error
    switch = offline_switch(settings.offline)
    if switch is not None:
        raise UserError(f"'{shown}' is not in the cache, and {switch} forbids asking its server")
    path = _place(url)
    try:
        path.parent.mkdir(exist_ok=True)
        with _one_at_a_time(path.with_suffix(".lock"), settings.seconds):
            # looked up again: whoever had the lock may have fetched it
            return cached(url) or _download(url, path, settings)
    except TooLargeError as error:
        raise UserError(f"'{shown}' {error}") from error
    except UnreachableError as error:
        raise UserError(f"'{shown}' cannot be fetched: {error}") from error
    except Timeout as error:
        raise UserError(
            f"'{shown}' cannot be fetched: another process is still fetching it after {settings.seconds:g} s"
        ) from error
    except OSError as error:
        raise UserError(f"'{shown}' cannot be kept in {path.parent}: {error}; set PADDLEMIX_CACHE") from error


@contextlib.contextmanager
def _one_at_a_time(lock: Path, seconds: float) -> Iterator[None]:
    """Lets one process at a time fetch an address.

    Raises:
        Timeout: another one has not finished in this time.
    """
    with FileLock(lock, timeout=seconds):
        try:
            yield
        finally:
            # While it is held, and by its holder alone: whoever gave up waiting would take it from under a download
            # that is still going on, and the next process would start a second one.
            lock.unlink(missing_ok=True)


def _download(url: str, path: Path, settings: RemoteSettings) -> Path:
    with Client(settings) as client:
        return client.repeat(lambda: _receive(client, url, path))


def _receive(client: Client, url: str, path: Path) -> Path:
    """Writes the body of an answer into the cache, and beside it what the server calls it."""
    with client.request(url) as response:
        if response.status_code != 200:
            raise UnreachableError(status_of(response))
        size = length_of(response) or 0
        client.check_size(size)
        kind = response.headers.get("Content-Type", "").split(";")[0].strip().lower()
        with replacing(path) as part:
            written = 0
            with open(part, "wb") as file:
                for chunk in client.chunks(response):
                    written += len(chunk)
                    client.check_size(written)
                    file.write(chunk)
            # requests does not notice a body that is cut short
            arrived = response.raw.tell()  # bytes over the wire, before any decoding
            if arrived < size or client.is_over:
                raise PassingError(f"the connection ended after {arrived:,} of {size:,} bytes")
            with replacing(path.with_suffix(".json")) as note:
                noted = {"url": without_secrets(url), "content_type": kind}
                note.write_text(json.dumps(noted), encoding="utf-8")
    return path
