"""Files of a model from a server into a directory: resumed after a break, checked against what the server announced.

Knows no hub: where files are and what they should be is said by `RemoteFile`.
"""

from __future__ import annotations

import hashlib
import math
import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from paddlemix.network.client import Client, RemoteSettings, Secret, length_of, status_of
from paddlemix.network.failures import PassingError, UnreachableError
from paddlemix.progress_bar import ProgressBar

PART_SUFFIX = ".part"
# Retries are counted anew with every byte that comes: a large file may take any time.
MODEL_DOWNLOADS = RemoteSettings(
    timeout=60.0, retries=2, max_bytes=1 << 50, deadline=math.inf, allow_local_network=True
)


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server.

    Args:
        path: below the model's directory.
        url: its address.
        size: bytes, None where the server does not say.
        checksum: hex: SHA-256 (64 digits), git's blob SHA-1 (40) or MD5 (32); None where the server names none.
        version: whatever the server calls this state of the file, e.g. its ETag; None where it says nothing.

    Raises:
        TypeError: one of them is of another type, as a server may answer.
    """

    path: str
    url: str
    size: int | None = None
    checksum: str | None = None
    version: str | None = None

    def __post_init__(self) -> None:
        texts = (self.path, self.url, self.checksum or "", self.version or "")
        if not all(isinstance(text, str) for text in texts) or not (self.size is None or type(self.size) is int):
            raise TypeError(f"{self.path!r} is announced with size {self.size!r} and checksum {self.checksum!r}")

    def part_of(self, path: Path) -> Path:
        """Where the file grows until it is whole: a name of its own for every version, so that two never mix."""
        version = hashlib.sha256(repr((self.url, self.size, self.checksum, self.version)).encode()).hexdigest()[:8]
        return path.with_name(f"{path.name}.{version}{PART_SUFFIX}")


def receive_file(file: RemoteFile, path: Path, secret: Secret | None = None) -> None:
    """Downloads one file to `path`, which appears when it is whole; an earlier attempt's part is resumed.

    Args:
        file: what is wanted.
        path: its folder exists; what has arrived is beside it, see `RemoteFile.part_of`.
        secret: proves who asks.

    Raises:
        UnreachableError: it cannot be had, or what came is not what was announced.
        OSError: it cannot be written.
    """
    part = file.part_of(path)
    # A resumed file consists of two downloads: where its checksum is wrong, the earlier one may have been.
    resumed = _size(part) > 0
    _receive_all(file, part, secret)
    if resumed and mismatch(part, file) is not None:  # the server may have lied, or the disk
        part.unlink()
        _receive_all(file, part, secret)
    wrong = mismatch(part, file)
    if wrong is not None:
        part.unlink()
        raise UnreachableError(f"{file.url} arrived damaged: {wrong}; try again")
    os.replace(part, path)


def _receive_all(file: RemoteFile, part: Path, secret: Secret | None) -> None:
    # whole already, but not renamed: the process was killed in between
    if part.is_file() and file.size is not None and _size(part) == file.size:
        return
    try:
        with Client(MODEL_DOWNLOADS, secret) as client:
            client.repeat(lambda: _receive(client, file, part), lambda: _size(part))
    except UnreachableError as error:
        raise UnreachableError(f"{file.url}: {error}") from error


def _receive(client: Client, file: RemoteFile, part: Path) -> None:
    """One attempt: appends to `part` if the server can resume there, else begins again."""
    offset = _size(part)
    headers = {"Range": f"bytes={offset}-"} if offset else {}
    with closing(client.request(file.url, headers=headers)) as response:
        if response.status_code == 416:  # nothing is left at this offset: the part is of something else
            part.unlink()
            raise PassingError(status_of(response))
        expect_found(response)
        _write(client, response, file, part, _first_byte(response, offset))


def _first_byte(response: requests.Response, offset: int) -> int:
    """Place in the file of the first byte of an answer to a request for what follows `offset`.

    Raises:
        UnreachableError: the answer is a part of the file that nobody asked for.
    """
    # status 200  -> the whole file: the server knows no ranges, and the part is written anew
    # status 206  -> the range that was asked for, or a fault of the server or of a cache on the way
    if response.status_code != 206:
        return 0
    sent = response.headers.get("Content-Range", "")
    if not offset or not sent.startswith(f"bytes {offset}-"):
        asked = f"bytes from {offset} on" if offset else "the whole file"
        raise UnreachableError(f"the server was asked for {asked} and sent {sent or 'a part that it does not name'}")
    return offset


def _write(client: Client, response: requests.Response, file: RemoteFile, part: Path, offset: int) -> None:
    length = length_of(response)
    total = file.size if length is None else offset + length
    with open(part, "ab" if offset else "wb") as out, ProgressBar(file.path, total, offset, "B") as bar:
        try:
            for chunk in client.chunks(response):
                out.write(chunk)
                bar.update(len(chunk))
        finally:
            out.flush()
            # also after an error: the next attempt resumes from what is certainly on the disk
            os.fsync(out.fileno())
    if client.is_over or (total is not None and _size(part) < total):
        raise PassingError(f"the connection ended after {_size(part):,} of {total or 0:,} bytes")


def expect_found(response: requests.Response) -> requests.Response:
    """The response, if it is not a refusal.

    Raises:
        UnreachableError: its status is 400 or above.
    """
    if response.status_code >= 400:
        meaning = "; it does not exist there or is not public" if response.status_code in (401, 403, 404) else ""
        raise UnreachableError(f"status {status_of(response)}{meaning}")
    return response


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def mismatch(path: Path, file: RemoteFile) -> str | None:
    """How a file differs from what the server announced; None where it does not."""
    if file.size is not None and _size(path) != file.size:
        return f"{_size(path):,} bytes, expected {file.size:,}"
    digests: dict[int, Any] = {64: hashlib.sha256, 40: hashlib.sha1, 32: hashlib.md5}
    kind = digests.get(len(file.checksum or ""))
    if kind is None:
        return None
    # git hashes a header before the content; the other two hash the content alone
    digest = kind(f"blob {_size(path)}\0".encode() if kind is hashlib.sha1 else b"")
    with open(path, "rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    found = digest.hexdigest()
    return None if found == file.checksum else f"its checksum is {found}, expected {file.checksum}"
