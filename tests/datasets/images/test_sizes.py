"""Sizes are read once for each file and state of it, by any number of processes, whatever happens to the index."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from paddlemix import cached_table
from paddlemix.datasets.images import sizes
from paddlemix.datasets.images.sizes import ImageSizes
from paddlemix.datasets.images.sources import ImageSettings
from paddlemix.errors import MissingFileError, UserError
from tests.faulty_server import PICTURE, serving
from tests.tiny import noise_picture


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PADDLEMIX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The paths whose headers are read."""
    seen: list[str] = []
    original = sizes.image_size

    def spy(path: str, settings: ImageSettings) -> tuple[int, int]:
        seen.append(path)
        return original(path, settings)

    monkeypatch.setattr(sizes, "image_size", spy)
    yield seen


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What is logged."""
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("paddlemix")
    logger.addHandler(handler)
    yield seen
    logger.removeHandler(handler)


def make(folder: Path, *sizes: tuple[int, int]) -> list[str]:
    paths = []
    for number, size in enumerate(sizes):
        path = folder / f"{number}.png"
        noise_picture(*size).save(path)
        paths.append(str(path))
    return paths


def test_a_header_is_read_once(tmp_path: Path, read: list[str]) -> None:
    paths = make(tmp_path, (3, 4), (5, 6), (7, 8), (9, 10), (11, 12))
    assert ImageSizes().get_many([*paths, paths[0]]) == [(3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (3, 4)]
    assert sorted(read) == paths
    again = ImageSizes()
    assert again.get(paths[1]) == (5, 6) and again.get_many(paths)[4] == (11, 12)
    assert len(read) == 5
    assert again.get_many([]) == []


def test_relative_paths(tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir()
    make(tmp_path, (3, 4))
    make(tmp_path / "other", (5, 6))
    sizes = ImageSizes()
    for folder, size in ((tmp_path, (3, 4)), (tmp_path / "other", (5, 6)), (tmp_path, (3, 4))):
        monkeypatch.chdir(folder)
        assert sizes.get("0.png") == size
    assert len(read) == 2


def test_a_changed_file_is_read_again(tmp_path: Path, read: list[str]) -> None:
    (path,) = make(tmp_path, (3, 4))
    sizes = ImageSizes()
    sizes.get(path)
    sizes.mark_decoded([path])
    assert sizes.is_decoded(path)
    make(tmp_path, (30, 40))
    assert not sizes.is_decoded(path)
    assert sizes.get(path) == (30, 40) and len(read) == 2
    assert not sizes.is_decoded(path)
    os.utime(path, ns=(1, 1))
    assert sizes.get(path) == (30, 40) and len(read) == 3


def test_a_changed_file_with_its_size_and_time_put_back(tmp_path: Path) -> None:
    path = tmp_path / "a.bmp"  # as many bytes for both
    noise_picture(8, 4).save(path)
    sizes, status = ImageSizes(), path.stat()
    assert sizes.get(str(path)) == (8, 4)
    noise_picture(4, 8).resize((8, 4)).save(path)
    turned = path.read_bytes().replace(b"\x08\0\0\0\x04\0\0\0", b"\x04\0\0\0\x08\0\0\0", 1)
    path.write_bytes(turned)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size and sizes.get(str(path)) == (4, 8)


def test_marks_stay(tmp_path: Path) -> None:
    paths = make(tmp_path, (3, 4), (5, 6))
    absent = str(tmp_path / "absent.png")
    ImageSizes().mark_decoded([paths[0], paths[0], absent, "data:,x"])
    sizes = ImageSizes()
    assert [sizes.is_decoded(path) for path in (*paths, absent, "data:,x", "a\0b")] == [True] + [False] * 4
    sizes.get_many(paths)
    assert sizes.is_decoded(paths[0])


def test_errors_stand_beside_sizes(tmp_path: Path) -> None:
    paths = make(tmp_path, (3, 4))
    (tmp_path / "text.png").write_text("hello")
    names = [str(tmp_path / "absent.png"), *paths, str(tmp_path / "text.png"), str(tmp_path), "a\0b", "data:,x"]
    found = ImageSizes().get_many(names)
    assert found[1] == (3, 4)
    assert isinstance(found[0], MissingFileError) and "does not exist" in str(found[0])
    assert [type(size) for size in found[2:]] == [UserError, MissingFileError, MissingFileError, UserError]
    with pytest.raises(MissingFileError, match="absent.png' does not exist"):
        ImageSizes().get(names[0])


def test_limits_hold_for_known_images(tmp_path: Path, read: list[str]) -> None:
    (path,) = make(tmp_path, (30, 40))
    ImageSizes().get(path)
    with pytest.raises(UserError, match="has 1,200 pixels .30 x 40.; .*max_image_pixels .1199"):
        ImageSizes(ImageSettings(max_pixels=1199)).get(path)
    with pytest.raises(UserError, match="is larger than 100 bytes"):
        ImageSizes(ImageSettings(max_bytes=100)).get(path)
    assert len(read) == 1


def test_names_of_any_bytes(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.png")
    noise_picture(3, 4).save(path)
    assert ImageSizes().get(path) == ImageSizes().get(path) == (3, 4)


def test_urls(monkeypatch: pytest.MonkeyPatch, read: list[str]) -> None:
    monkeypatch.delenv("PADDLEMIX_OFFLINE")
    settings = ImageSettings(allow_local_network=True, retries=0)
    with serving() as server:
        url = f"{server.address}/picture.png"
        assert not ImageSizes(settings).is_decoded(url) and server.asked == []
        found = ImageSizes(settings).get_many([url, f"{server.address}/missing"])
        assert found[0] == PICTURE.size and isinstance(found[1], UserError)
        assert ImageSizes(settings).get(url) == PICTURE.size
        ImageSizes(settings).mark_decoded([url])
        assert ImageSizes(settings).is_decoded(url)
        assert server.asked == ["picture.png", "missing"] and read == [url]
    assert ImageSizes(ImageSettings(offline=True)).get(url) == PICTURE.size


def test_damaged_index(tmp_path: Path, cache: Path, read: list[str], warnings: list[str]) -> None:
    (path,) = make(tmp_path, (3, 4))
    cache.mkdir(parents=True)
    (cache / "sizes-3.sqlite3").write_bytes(b"this is no database, and long enough to be none " * 100)
    assert ImageSizes().get(path) == (3, 4)
    assert len(warnings) == 1 and "is damaged" in warnings[0] and "is rebuilt" in warnings[0]
    assert ImageSizes().get(path) == (3, 4) and len(read) == 1 and len(warnings) == 1


def test_index_damaged_while_open(tmp_path: Path, cache: Path, warnings: list[str]) -> None:
    paths = make(tmp_path, *((number + 1, 2) for number in range(300)))
    sizes = ImageSizes()
    sizes.get_many(paths)
    file = cache / "sizes-3.sqlite3"
    with sqlite3.connect(file) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    content = bytearray(file.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    file.write_bytes(content)
    assert ImageSizes().get_many(paths) == [(number + 1, 2) for number in range(300)]
    assert any("is rebuilt" in warning for warning in warnings)
    assert sizes.get_many(paths)[7] == (8, 2)


def test_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: list[str], warnings: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PADDLEMIX_CACHE", str(tmp_path / "file"))
    (path,) = make(tmp_path, (3, 4))
    sizes = ImageSizes()
    assert sizes.get(path) == sizes.get(path) == (3, 4)
    sizes.mark_decoded([path])
    assert sizes.is_decoded(path)
    assert len(read) == 1 and len(warnings) == 1 and "in memory only" in warnings[0]
    assert pickle.loads(pickle.dumps(sizes)).is_decoded(path)


def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str], read: list[str]) -> None:
    (path,) = make(tmp_path, (3, 4))

    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(cached_table, "store_rows", fail)
    sizes = ImageSizes()
    assert sizes.get(path) == sizes.get(path) == (3, 4)
    assert len(read) == 1 and warnings == [
        "the sizes of images are kept in memory only, the index in the cache cannot be used: database or disk is full"
    ]


def test_pickled(tmp_path: Path) -> None:
    (path,) = make(tmp_path, (3, 4))
    sizes = ImageSizes(ImageSettings(max_pixels=12))
    sizes.get(path)
    assert pickle.loads(pickle.dumps(sizes)).get(path) == (3, 4)


def look_up(sizes: ImageSizes, paths: list[str], start: int) -> list[tuple[int, int] | UserError]:
    turned = paths[start:] + paths[:start]
    sizes.mark_decoded(turned[:20])
    return sizes.get_many(turned)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_several_processes(tmp_path: Path, method: str, warnings: list[str]) -> None:
    paths = make(tmp_path, *((number + 1, 3) for number in range(120)))
    sizes = ImageSizes()
    if method == "fork":
        sizes.get_many(paths[:10])  # a connection is open
    with multiprocessing.get_context(method).Pool(3 if method == "spawn" else 6) as pool:
        for start, found in enumerate(pool.starmap(look_up, [(sizes, paths, start) for start in range(6)], 1)):
            assert found == [(number % 120 + 1, 3) for number in range(start, start + 120)]
    assert sum(map(sizes.is_decoded, paths)) == 25 and warnings == []


def test_several_threads(tmp_path: Path) -> None:
    paths = make(tmp_path, *((number + 1, 3) for number in range(50)))
    sizes = ImageSizes()
    with ThreadPoolExecutor(6) as pool:
        for found in pool.map(lambda start: look_up(sizes, paths, start), range(12)):
            assert len(found) == 50
