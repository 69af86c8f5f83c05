"""A model's files from a server into a directory: go on after a break, check, appear whole or not at all.

    download_model("lmsys/vicuna-7b-v1.5", target, lambda: None)

A download grows in a hidden folder beside its place and is renamed when every file is there and checked: a killed one
leaves no half model, and the next one goes on where it stopped.  Knows no cache but the place that it is given.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests
from filelock import FileLock
from tqdm import tqdm

from paddlemix.checkpoints.directories import writing
from paddlemix.checkpoints.remote import (
    ATTEMPTS,
    RETRIED,
    RemoteFile,
    UnavailableError,
    existing,
    list_files,
    pause,
    send,
)
from paddlemix.errors import UserError
from paddlemix.log import logger
from paddlemix.network.failures import plain_cause

_CHUNK = 1 << 18  # bytes


class _InterruptedError(Exception):
    """A transfer stopped; another attempt may go on."""


def download_model(name: str, target: Path, find: Callable[[], Path | None]) -> Path:
    """Downloads a model; several processes that want the same one wait for the first.

    Args:
        name: `paddlemix/...` from PaddleMIX's server, else `owner/name` from Hugging Face.
        target: the directory to make, or to complete.
        find: looks whether another process has fetched the model meanwhile.

    Returns:
        `target`, or what `find` gave.

    Raises:
        UnavailableError: no such model, no network, or what arrived is damaged.
        UserError: `target` cannot be written.
    """
    partial = target.with_name(f".{target.name}.partial")
    with requests.Session() as session, writing(target):
        session.headers["Accept-Encoding"] = "identity"  # sizes and ranges are of the file itself
        files = list_files(session, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{partial}.lock"):
            found = find()
            if found is not None:
                return found
            partial.mkdir(exist_ok=True)
            _check_space(files, partial)
            logger.info("downloading %s to %s: %d files", name, target, len(files))
            for file in files:
                _fetch(session, file, partial / file.path)
            _put_in_place(partial, target)
    return target


def _check_space(files: list[RemoteFile], partial: Path) -> None:
    there = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    needed, free = sum(file.size or 0 for file in files) - there, shutil.disk_usage(partial).free
    if needed > free:
        raise UserError(f"the download needs {needed:,} bytes more, {partial.parent} has {free:,}; set PPMIX_HOME")


def _fetch(session: requests.Session, file: RemoteFile, path: Path) -> None:
    """Downloads one file to `path`, going on where an earlier attempt stopped, and checks it."""
    if path.is_file() and _mismatch(path, file) is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    resumed = _size(part) > 0
    _receive_all(session, file, part)
    if resumed and _mismatch(part, file) is not None:  # the earlier part may be of another version
        part.unlink()
        _receive_all(session, file, part)
    wrong = _mismatch(part, file)
    if wrong is not None:
        part.unlink()
        raise UnavailableError(f"{file.url} arrived damaged: {wrong}; try again")
    os.replace(part, path)


def _receive_all(session: requests.Session, file: RemoteFile, part: Path) -> None:
    failures = 0
    while file.size is None or _size(part) != file.size or not part.is_file():
        before = _size(part)
        try:
            _receive(session, file, part)
            return
        except _InterruptedError as error:
            failures = 0 if _size(part) > before else failures + 1
            if failures == ATTEMPTS:
                raise UnavailableError(f"{file.url}: {error} ({ATTEMPTS} attempts without a new byte)") from error
            logger.warning("%s: %s; trying again", file.url, error)
            pause(failures)


def _receive(session: requests.Session, file: RemoteFile, part: Path) -> None:
    """One attempt: appends to `part` if the server can go on from there, else begins again."""
    offset = _size(part)
    headers = {"Range": f"bytes={offset}-"} if offset else {}
    try:
        with send(session, "GET", file.url, headers=headers, stream=True) as response:
            if response.status_code == 416:  # nothing is left at this offset: the part is of something else
                part.unlink()
            if response.status_code in (416, *RETRIED):
                raise _InterruptedError(f"status {response.status_code}")
            existing(response)
            goes_on = response.headers.get("Content-Range", "").startswith(f"bytes {offset}-")
            _write(response, file, part, offset if response.status_code == 206 and goes_on else 0)
    except requests.RequestException as error:
        raise _InterruptedError(plain_cause(error)) from error


def _write(response: requests.Response, file: RemoteFile, part: Path, offset: int) -> None:
    length = response.headers.get("Content-Length", "")
    total = offset + int(length) if length.isdecimal() else file.size
    shown = {"total": total, "initial": offset, "unit": "B", "unit_scale": True, "unit_divisor": 1024}
    with open(part, "ab" if offset else "wb") as out, tqdm(desc=file.path, disable=None, **shown) as bar:
        for chunk in response.iter_content(_CHUNK):
            out.write(chunk)
            bar.update(len(chunk))
        out.flush()
        os.fsync(out.fileno())
    if total is not None and _size(part) < total:
        raise _InterruptedError(f"the connection ended after {_size(part):,} of {total:,} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _mismatch(path: Path, file: RemoteFile) -> str | None:
    """How a file differs from what the server announced; None where it does not."""
    if file.size is not None and _size(path) != file.size:
        return f"{_size(path):,} bytes, expected {file.size:,}"
    digests: dict[int, Any] = {64: hashlib.sha256, 40: hashlib.sha1, 32: hashlib.md5}
    kind = digests.get(len(file.checksum or ""))
    if kind is None:
        return None
    digest = kind(f"blob {_size(path)}\0".encode() if kind is hashlib.sha1 else b"")
    with open(path, "rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    found = digest.hexdigest()
    return None if found == file.checksum else f"its checksum is {found}, expected {file.checksum}"


def _put_in_place(partial: Path, target: Path) -> None:
    """Renames a finished download; where `target` is there already but incomplete, its files move in one by one."""
    if not target.exists():
        os.rename(partial, target)
        return
    names = [path.relative_to(partial) for path in partial.rglob("*") if path.is_file() and path.suffix != ".part"]
    for name in sorted(names, key=lambda name: str(name) == "config.json"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / name, target / name)
    shutil.rmtree(partial)
