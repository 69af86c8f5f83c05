"""Digests of files: made once, made again whenever a file may have changed, equal where its content is equal."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paddlemix import identity
from paddlemix.cached_table import CachedTable
from paddlemix.errors import MissingFileError
from paddlemix.identity import (
    differences,
    file_digest,
    file_digests,
    file_state,
    known_digests,
    listed,
    text_digest,
    wait_until_settled,
)

PIECE = 8 * 1024**2


@pytest.fixture(autouse=True)
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The first bytes of all pieces that were hashed; an empty cache; files count as settled at once."""
    monkeypatch.setenv("PADDLEMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "_table", CachedTable(identity._LAYOUT))
    monkeypatch.setattr(identity, "_GRANULARITY_NS", -(10**12))
    starts: list[int] = []
    original = identity._hash_piece

    def spy(descriptor: int, start: int) -> bytes:
        starts.append(start)
        return original(descriptor, start)

    monkeypatch.setattr(identity, "_hash_piece", spy)
    yield starts


def blake2b(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_value(tmp_path: Path) -> None:
    content = bytes(range(256)) * (PIECE // 256) + b"the second piece"
    parts = blake2b(content[:PIECE]) + blake2b(content[PIECE:])
    assert file_digest(write(tmp_path / "large", content)) == blake2b(parts).hex()
    assert file_digest(write(tmp_path / "small", b"abc")) == blake2b(blake2b(b"abc")).hex()
    assert file_digest(write(tmp_path / "empty", b"")) == blake2b(blake2b(b"")).hex()


def test_hashed_once(tmp_path: Path, hashed: list[int]) -> None:
    path = write(tmp_path / "file", b"content")
    first = file_digest(path)
    assert file_digest(path) == file_digest(str(path)) == first and hashed == [0]
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    assert file_digest(tmp_path / "link" / "file") == first and hashed == [0]


def test_touched_or_copied_is_hashed_again_and_equal(tmp_path: Path, hashed: list[int]) -> None:
    path = write(tmp_path / "file", b"content")
    first = file_digest(path)
    os.utime(path, ns=(1, 1))
    assert file_digest(path) == first and hashed == [0, 0]
    shutil.copy2(path, tmp_path / "copy")
    assert file_digest(tmp_path / "copy") == first and hashed == [0, 0, 0]
    os.replace(tmp_path / "copy", path)  # another inode, the same time
    assert file_digest(path) == first and len(hashed) == 4


@pytest.mark.parametrize("place", [0, PIECE - 1, PIECE, PIECE + 5])
def test_one_byte_with_its_time_put_back(tmp_path: Path, place: int) -> None:
    path = write(tmp_path / "file", bytes(PIECE + 6))
    first, status = file_digest(path), path.stat()
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"\1")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file_digest(path) != first


def test_fresh_files_are_not_trusted_yet(tmp_path: Path, hashed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "file", b"content")
    monkeypatch.setattr(identity, "_GRANULARITY_NS", 10**15)
    assert file_digest(path) == file_digest(path) and hashed == [0, 0]


def test_large_fresh_files_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(identity, "_GRANULARITY_NS", 10**15)
    state = file_state(write(tmp_path / "file", b"content"))
    assert state is not None
    wait_until_settled([state])
    assert slept == []
    wait_until_settled([state], worth=7)
    assert len(slept) == 1 and 0 < slept[0] <= 10**6 + 1
    wait_until_settled([state._replace(ctime_ns=time.time_ns() + 10**12)], worth=7)  # another machine's clock
    assert len(slept) == 1


def test_changed_while_it_is_hashed_is_not_kept(
    tmp_path: Path, hashed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, original = write(tmp_path / "file", b"old"), identity._hash_piece

    def changing(descriptor: int, start: int) -> bytes:
        digest = original(descriptor, start)
        write(path, b"newer")
        return digest

    monkeypatch.setattr(identity, "_hash_piece", changing)
    old = file_digest(path)
    monkeypatch.setattr(identity, "_hash_piece", original)
    assert file_digest(path) != old and len(hashed) == 2


def test_many_with_some_missing(tmp_path: Path, hashed: list[int]) -> None:
    paths = [write(tmp_path / "images" / f"{number}.png", b"%d" % (number % 7)) for number in range(700)]
    found = file_digests([*paths, tmp_path / "missing.png", tmp_path, "a\0b"])
    assert found[700:] == [None, None, None]
    assert found[:700] == [blake2b(blake2b(b"%d" % (number % 7))).hex() for number in range(700)]
    assert file_digests(paths) == found[:700] and len(hashed) == 700
    assert known_digests(paths, [file_state(path) for path in paths]) == found[:700]
    write(paths[3], b"9")
    assert known_digests(paths[2:5], [file_state(path) for path in paths[2:5]]) == [found[2], None, found[4]]


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="'.*nothing' does not exist or cannot be read"):
        file_digest(tmp_path / "nothing")


@pytest.mark.parametrize("change", ["digest = x'00112233445566778899aabbccddeeff'", "digest = 'x'", "checksum = 0"])
def test_damaged_entry_is_made_again(tmp_path: Path, hashed: list[int], change: str) -> None:
    path = write(tmp_path / "file", b"content")
    first = file_digest(path)
    with sqlite3.connect(tmp_path / "cache" / "digests" / "digests-1.sqlite3") as database:
        database.execute(f"UPDATE facts SET {change}")
    database.close()
    assert file_digest(path) == first and hashed == [0, 0]
    assert file_digest(path) == first and hashed == [0, 0]


def test_cut_cache_is_made_again(tmp_path: Path, hashed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "file", b"content")
    first = file_digest(path)
    monkeypatch.setattr(identity, "_table", CachedTable(identity._LAYOUT))
    for file in (tmp_path / "cache" / "digests").iterdir():
        file.unlink()
    write(tmp_path / "cache" / "digests" / "digests-1.sqlite3", b"no database at all " * 400)
    assert file_digest(path) == file_digest(path) == first and hashed == [0, 0]


def test_several_processes(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{number}", b"%d" % number) for number in range(100)]
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(file_digests, [paths] * 8)
    assert found == [file_digests(paths)] * 8


def test_differences() -> None:
    assert differences({"a": "1", "b": "2"}, {"b": "2", "a": "1"}) == []
    assert differences({"a": "1", "b": "2"}, {"b": "3", "c": "4"}) == ["changed: b", "missing: a", "new: c"]
    many = {f"{number}.png": "x" for number in range(9)}
    assert differences(many, dict.fromkeys(many, "y"), shown=2) == ["changed: 0.png, 1.png and 7 more"]
    assert listed(["a", "b"]) == "a, b"


def test_text_digest() -> None:
    assert text_digest("a", "b") != text_digest("ab") and text_digest(1, "\udcff") == text_digest("1", "\udcff")
