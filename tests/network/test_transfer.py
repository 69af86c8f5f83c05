"""A model's file resumes where it stopped, and what a server sends instead of that is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from paddlemix.network import client
from paddlemix.network.failures import UnreachableError
from paddlemix.network.transfer import RemoteFile, receive_file
from tests.hub_server import HubServer, serving_hub, sha256

CONTENT = bytes(range(256)) * 8


@pytest.fixture(scope="module")
def running() -> Iterator[HubServer]:
    with serving_hub() as server:
        yield server


@pytest.fixture
def file(running: HubServer, monkeypatch: pytest.MonkeyPatch) -> RemoteFile:
    monkeypatch.setattr(client, "_sleep", lambda seconds: None)
    running.seen.clear()
    running.put("/a.txt", CONTENT)
    running.faults.clear()
    return RemoteFile("a.txt", f"{running.address}/a.txt", len(CONTENT), sha256(CONTENT))


def begin(file: RemoteFile, folder: Path, content: bytes = CONTENT[:1000]) -> Path:
    """The part that an earlier attempt has left."""
    part = file.part_of(folder / file.path)
    part.write_bytes(content)
    return part


@pytest.mark.parametrize("fault", ["", "whole"])
def test_a_part_is_resumed(running: HubServer, file: RemoteFile, tmp_path: Path, fault: str) -> None:
    """Also by a server that knows no ranges and sends the whole file."""
    begin(file, tmp_path)
    running.set_faults("/a.txt", fault)
    receive_file(file, tmp_path / file.path)
    assert (tmp_path / file.path).read_bytes() == CONTENT
    assert running.ranges("/a.txt") == ["bytes=1000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("kept", [1000, 0])
def test_another_range_than_the_one_asked_for_is_refused(
    running: HubServer, file: RemoteFile, tmp_path: Path, kept: int
) -> None:
    part = begin(file, tmp_path, CONTENT[:kept])
    running.set_faults("/a.txt", "range 500")
    asked = "bytes from 1000 on" if kept else "the whole file"
    with pytest.raises(UnreachableError, match=f"asked for {asked} and sent bytes 500-2047/2048"):
        receive_file(file, tmp_path / file.path)
    assert part.read_bytes() == CONTENT[:kept]  # nothing was written over it
    assert not (tmp_path / file.path).exists()
    receive_file(file, tmp_path / file.path)
    assert (tmp_path / file.path).read_bytes() == CONTENT


def test_a_part_of_unknown_place_is_refused(running: HubServer, file: RemoteFile, tmp_path: Path) -> None:
    part = begin(file, tmp_path)
    running.set_faults("/a.txt", "206")
    with pytest.raises(UnreachableError, match="asked for bytes from 1000 on and sent a part that it does not name"):
        receive_file(file, tmp_path / file.path)
    assert part.read_bytes() == CONTENT[:1000]


def test_a_damaged_part_is_fetched_anew(running: HubServer, file: RemoteFile, tmp_path: Path) -> None:
    begin(file, tmp_path, b"?" * 1000)
    receive_file(file, tmp_path / file.path)
    assert (tmp_path / file.path).read_bytes() == CONTENT
    assert running.ranges("/a.txt") == ["bytes=1000-", None]


def test_what_arrives_damaged_is_not_kept(running: HubServer, file: RemoteFile, tmp_path: Path) -> None:
    running.set_faults("/a.txt", "damage")
    with pytest.raises(UnreachableError, match="arrived damaged: its checksum"):
        receive_file(file, tmp_path / file.path)
    assert list(tmp_path.iterdir()) == []
