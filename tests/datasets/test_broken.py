"""One table of everything that can be broken: each is one named error or one counted skip, never a hang.

A row is a name, how to make the thing, and what its error says.  Records, images and servers stand as record 1 of a
data file, between good ones.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import re
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from PIL import Image

from paddlemix.datasets.data_settings import DataSettings
from paddlemix.datasets.images.sources import ImageSettings
from paddlemix.datasets.mixture import SampleDataset
from paddlemix.datasets.records.record_file import open_records
from paddlemix.errors import UserError
from paddlemix.network.client import RemoteSettings
from paddlemix.processors.text.tokenizer import Tokenizer
from paddlemix.sample import Row
from tests.conftest import HANG
from tests.faulty_server import FaultyServer, serving
from tests.tiny import make_processor, noise_picture

T = TypeVar("T")
MAX_BYTES = 40_000
IMAGES = ImageSettings(max_bytes=MAX_BYTES, timeout=300, retries=0, allow_local_network=True, offline=False)
NEVER = ("silence", "dripping-body", "dripping-headers")  # what these servers send is waited for in vain
QUESTION, ANSWER = {"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A cat."}
GOOD = {"conversations": [QUESTION, ANSWER]}


def talk(*turns: Any, **keys: Any) -> dict[str, Any]:
    return {"conversations": list(turns), **keys}


def shown(*turns: Any, image: Any = "good.png", **keys: Any) -> dict[str, Any]:
    question = {"from": "human", "value": "<image>\nWhat is it?"}
    return talk(*(turns or (question, ANSWER)), image=image, **keys)


RECORDS: dict[str, tuple[Any, str]] = {
    "no keys": ({}, r"keys: none"),
    "unknown keys": ({"conversation": []}, r"keys: conversation.*did you mean 'conversations'"),
    "no turns": (talk(), "'conversations' is not a list of turns or is empty"),
    "turns of text": ({"conversations": "Q A"}, "'conversations' is not a list of turns"),
    "turns of numbers": (talk(1, 2), "neither .question, answer. pairs nor"),
    "mixed turns": (talk(QUESTION, ["Q", "A"]), "neither .question, answer. pairs nor"),
    "turn without value": (talk({"from": "human"}, ANSWER), "turn 1 has the keys from, expected 'from' and 'value'"),
    "unknown role": (talk({"from": "robot", "value": "Q"}, ANSWER), "turn 1: from='robot' is not one of human"),
    "value null": (talk(QUESTION, {"from": "gpt", "value": None}), "turn 2: value is a JSON null, expected text"),
    "value number": (talk({"from": "human", "value": 3}, ANSWER), "turn 1: value is a JSON number, expected text"),
    "pair of three": (talk(["Q", "A", "B"]), "pair 1 is .*expected .question, answer. texts"),
    "pair of null": (talk(["Q", None]), r"pair 1 is \[\"Q\", null\], expected"),
    "answer first": (talk(ANSWER, QUESTION), "turn 1 is by the assistant, expected the user"),
    "two questions": (talk(QUESTION, QUESTION, ANSWER), "turn 2 is by the user, expected the assistant"),
    "two answers": (talk(QUESTION, ANSWER, ANSWER), "turn 3 is by the assistant, expected the user"),
    "no answer": (talk(QUESTION), "the last question has no answer"),
    "only a system": (talk({"from": "system", "value": "Be good."}), "0 turns: the last question has no answer"),
    "empty answer": (talk(QUESTION, {"from": "gpt", "value": ""}), "turn 2: the answer is empty"),
    "blank answer": (talk(QUESTION, {"from": "gpt", "value": " \n\t"}), "turn 2: the answer is empty"),
    "half surrogate": (talk(["Q", "smile \ud83d"]), r"half a character, '\\ud83d', follows the text 'smile '"),
    "half surrogate in a path": (shown(image="\udc00.png"), "half a character"),
    "image without place": (talk(QUESTION, ANSWER, image="good.png"), "0 <image> in the questions but 1 in 'image'"),
    "place without image": (shown(image=None), "1 <image> in the questions but 0 in 'image'"),
    "too many images": (shown(image=["good.png"] * 3), "1 <image> in the questions but 3 in 'image'"),
    "image number": (shown(image=7), "image is 7, expected a path or URL"),
    "image empty": (shown(image=""), 'image is "", expected a path or URL'),
    "image list of null": (shown(image=[None]), "image is null, expected a path or URL"),
    "image with zero": (shown(image="a\0b.png"), "has no NUL character"),
    "content of parts": ({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, 'a part of type "sound"'),
    "messages of text": ({"messages": ["Q", "A"]}, "'messages' is not a list of"),
    "two conversations": ({**GOOD, "query": "Q", "response": "A"}, "are each a conversation"),
    "query without response": ({"query": "Q"}, "response is a JSON null, expected text"),
    "box of three": (shown(objects={"bbox": [[1, 2, 3]]}), "expected four numbers"),
    "box of no image": (talk(["<bbox>", "A"], objects={"bbox": [[1, 2, 3, 4]]}), "none of the record's 0 images"),
    "video": ({**GOOD, "videos": ["a.mp4"]}, "'videos' is not supported"),
    "record of text": ("Q", "a JSON text, expected an object"),
    "record null": (None, "a JSON null, expected an object"),
}


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int) -> bytes:
    """A PNG that promises so many pixels and holds none."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b"")


def encoded(kind: str, picture: Image.Image | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    (picture or noise_picture(60, 40)).save(file, kind, **options)
    return file.getvalue()


def content(name: str, data: Callable[[], bytes]) -> Callable[[Path], str]:
    """A file of these bytes."""

    def make(folder: Path) -> str:
        (folder / name).write_bytes(data())
        return name

    return make


def folder_named_as_image(folder: Path) -> str:
    (folder / "bad.png").mkdir()
    return "bad.png"


def dead_link(folder: Path) -> str:
    (folder / "bad.png").symlink_to(folder / "gone.png")
    return "bad.png"


def circle_of_links(folder: Path) -> str:
    (folder / "bad.png").symlink_to(folder / "bad.png")
    return "bad.png"


def pipe(folder: Path) -> str:
    os.mkfifo(folder / "bad.png")
    return "bad.png"


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def deep_grey() -> Image.Image:
    return Image.fromarray(np.ones((4, 4), dtype=np.int32))


BAD_IMAGES: dict[str, tuple[Callable[[Path], str], str]] = {
    "missing": (lambda _: "absent.png", "absent.png' does not exist .relative paths start from the image root"),
    "folder": (folder_named_as_image, "bad.png' is a folder"),
    "below a file": (lambda _: "good.png/a.png", "does not exist"),
    "dead link": (dead_link, "does not exist"),
    "circle of links": (circle_of_links, "cannot be read: Too many levels of symbolic links"),
    "pipe": (pipe, "is not a file but a device or a pipe"),
    "path too long": (lambda _: "a" * 5000, "is too long for a path"),
    "empty file": (content("bad.png", lambda: b""), "is not an image file that can be read"),
    "text file": (content("bad.png", lambda: b"hello"), "is not an image file that can be read"),
    "web page": (content("bad.jpg", lambda: b"<html>404</html>"), "is not an image file that can be read"),
    "signature alone": (content("bad.png", lambda: png_of(1, 1)[:8]), "is (not an image|broken)"),
    "truncated JPEG": (content("bad.jpg", lambda: encoded("JPEG")[:-500]), "bad.jpg' is broken: "),
    "truncated PNG": (content("bad.png", lambda: encoded("PNG")[:-500]), "bad.png' is broken: "),
    "truncated GIF": (content("bad.gif", lambda: encoded("GIF")[:-500]), "bad.gif' is broken: "),
    "truncated WebP": (content("bad.webp", lambda: encoded("WEBP")[:-500]), "bad.webp' is (not an image|broken)"),
    "truncated TIFF": (content("bad.tiff", lambda: encoded("TIFF")[:5000]), "bad.tiff' is (not an image|broken)"),
    "truncated CMYK": (
        content("bad.jpg", lambda: encoded("JPEG", noise_picture(60, 40).convert("CMYK"))[:-900]),
        "bad.jpg' is broken: ",
    ),
    "flipped bytes": (content("bad.png", lambda: encoded("PNG").replace(b"IDAT", b"XDAT")), "bad.png' is "),
    "no pixels": (content("bad.png", lambda: png_of(9, 9)), "bad.png' is broken: "),
    "bomb": (content("bad.png", lambda: png_of(60_000, 60_000)), "bad.png' is broken: .*3600000000 pixels"),
    "GIF of no size": (
        content("bad.gif", lambda: b"GIF89a\0\0\0\0\0\0\0,\0\0\0\0\0\0\0\0\0\2\0;"),
        "bad.gif' is (not an image|broken)",
    ),
    "PNG of no size": (content("bad.png", lambda: png_of(0, 7)), "bad.png' is (not an image|broken)"),
    "32 bits": (content("bad.tiff", lambda: encoded("TIFF", deep_grey())), "32-bit pixels of unknown range"),
    "PostScript": (content("bad.eps", lambda: encoded("EPS")), "is PostScript, which is a program"),
    "too many bytes": (content("bad.bmp", lambda: encoded("BMP", noise_picture(300, 60))), "larger than 40000 bytes"),
    "data URI without comma": (lambda _: "data:image/png;base64", "is not a data URI"),
    "data URI of no base64": (lambda _: "data:image/png;base64,****", "is not base64 throughout"),
    "data URI of text": (lambda _: data_uri(b"hello", "text/plain"), "holds 'text/plain', expected image/png"),
    "data URI of no image": (lambda _: data_uri(b"hello"), "is not an image file that can be read"),
    "data URI truncated": (lambda _: data_uri(encoded("PNG")[:-500]), "is broken: "),
    "data URI too large": (lambda _: data_uri(bytes(MAX_BYTES + 1)), "is larger than 40000 bytes"),
    "another scheme": (lambda _: "ftp://example.org/a.png", "ftp:// is not supported; use http://, https:// or data:"),
}

SERVERS = {
    "missing": "cannot be fetched: 404 Not Found",
    "forbidden": "cannot be fetched: 403 Forbidden",
    "failing": "cannot be fetched: 500 Internal Server Error",
    "busy-for-hours": "cannot be fetched: 503 Service Unavailable",
    "nothing": "cannot be fetched: 204 No Content",
    "silence": "cannot be fetched: .*(timed out|complete|came)",
    "dripping-body": "cannot be fetched: .*(complete|came)",
    "dripping-headers": "cannot be fetched: .*(complete|came)",
    "endless": "is larger than 40000 bytes .max_image_bytes=40000",
    "huge": "is larger than 40000 bytes .max_image_bytes=40000",
    "short": "cannot be fetched: ",
    "long": "is broken: ",
    "cut-chunks": "cannot be fetched: ",
    "false-gzip": "cannot be fetched: ",
    "close": "cannot be fetched: ",
    "garbage": "cannot be fetched: ",
    "html": "is not an image file that can be read; its server sent 'text/html'",
    "untyped": "is not an image file that can be read; its server sent 'no content type'",
    "loop": "cannot be fetched: it redirects more than 5 times",
    "astray": "cannot be fetched: 302 Found",
    "to-file": "redirects to 'file:///etc/passwd': the scheme 'file' is neither http nor https",
    "to-nowhere": "redirects to 'http://.broken/'",
}


def lines(*records: Any) -> str:
    return "\n".join(record if isinstance(record, str) else json.dumps(record) for record in records)


FILES: dict[str, tuple[bytes | str, str]] = {
    "empty": ("", "holds no record"),
    "white space": (" \n\t ", "holds no record"),
    "empty array": ("[]", "holds no record"),
    "text": ("hello", "is not JSON"),
    "number": ("17", "holds a JSON number"),
    "string": ('"[]"', "holds a JSON text"),
    "table": ("image_id,question\n1,What?", "is not JSON"),
    "web page": ("<!DOCTYPE html><html>", "begins like a web page"),
    "UTF-16": (json.dumps([GOOD]).encode("utf-16"), "is UTF-16; save it as UTF-8"),
    "UTF-16 without mark": (json.dumps([GOOD]).encode("utf-16-le"), "is UTF-16; save it as UTF-8"),
    "Latin-1": (b'[{"conversations": [["Q", "caf\xe9"]]}]', "is not UTF-8 .byte"),
    "gzip": (gzip.compress(json.dumps([GOOD]).encode()), "is compressed with gzip"),
    "zip": (b"PK\x03\x04" + bytes(40), "is a zip archive"),
    "Parquet": (b"PAR1" + bytes(40), "is a Parquet file"),
    "truncated array": (json.dumps([GOOD, GOOD])[:-30], "is not JSON: line 1, column"),
    "array without end": (json.dumps([GOOD, GOOD])[:-1], "is not JSON: line 1, column"),
    "comma too many": ("[" + json.dumps(GOOD) + ",]", "is not JSON: line 1, column"),
    "comma missing": (lines("[", GOOD, GOOD, "]"), "is not JSON: line 3, column 1: Expecting ',' delimiter"),
    "text behind the array": (json.dumps([GOOD]) + "x", "is not JSON: line 1, column"),
    "single quotes": ("[{'conversations': []}]", "is not JSON: line 1, column"),
    "infinity": ('[{"conversations": [["Q", "A"]], "score": Infinity}]', "Infinity is not JSON"),
    "object over lines": (json.dumps(GOOD, indent=1), "an object that is spread over lines"),
    "nested without end": ("[" * 100_000, "is not JSON|expected an object"),
}

BROKEN_LINES = {
    "broken line": (json.dumps(GOOD)[:-9], "not JSON"),
    "line that is no object": ("[1, 2]", "a JSON array, expected an object"),
    "line of two records": (json.dumps(GOOD) * 2, "not JSON"),
    "NaN in a line": ('{"conversations": [["Q", "A"]], "score": NaN}', "NaN is not JSON"),
}


def test_the_table_is_long_enough() -> None:
    assert sum(map(len, (RECORDS, BAD_IMAGES, SERVERS, FILES, BROKEN_LINES))) >= 100


def within_time(action: Callable[[], T]) -> T:
    """What the action gives or raises; fails where it hangs."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(HANG)
    if thread.is_alive():
        pytest.fail(f"still not finished after {HANG:g} s")
    if errors:
        raise errors[0]
    return results[0]


class Bench:
    """Builds data sets in a folder with one good image."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.folder = folder
        self.images = IMAGES
        self._processor = make_processor(tokenizer)
        noise_picture(30, 40).save(folder / "good.png")

    def write(self, *records: Any, name: str = "data.json") -> None:
        (self.folder / name).write_text(json.dumps(list(records)), encoding="utf-8")

    def open(self, on_bad_sample: str, name: str = "data.json") -> SampleDataset:
        settings = DataSettings(
            on_bad_sample=on_bad_sample, max_bad_fraction=0.5, image_root=str(self.folder), images=self.images
        )
        entry = {"data_files": str(self.folder / name)}
        return within_time(lambda: SampleDataset([entry], lambda _: self._processor, settings))


@pytest.fixture
def bench(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("PADDLEMIX_CACHE", str(tmp_path / "cache"))
    return Bench(tmp_path, tokenizer)


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyServer]:
    with serving() as running:
        yield running


def expect_error(action: Callable[[], Any], start: str, problem: str) -> None:
    with pytest.raises(UserError, match=rf"(?s){start}.*?{problem}") as caught:
        within_time(action)
    assert len(str(caught.value)) < 1500


def expect_left_out_at_once(bench: Bench, name: str, problem: str) -> None:
    """Record 1 of three is an error, or is counted and left out when the file is opened."""
    expect_error(lambda: bench.open("error", name), rf"{name} record 1\b", problem)
    dataset = bench.open("skip", name)
    [(source, reason)] = dataset.unreadable
    assert len(dataset) == 2 and source.endswith(f"{name} record 1")
    assert [len(within_time(lambda index=index: dataset[index]).examples) for index in range(2)] == [1, 1]
    assert re.search(problem, reason, re.DOTALL)


@pytest.mark.parametrize("name", RECORDS)
def test_record(bench: Bench, name: str) -> None:
    record, problem = RECORDS[name]
    if isinstance(record, dict):
        bench.write(GOOD, record, shown())
        expect_left_out_at_once(bench, "data.json", problem)
    else:  # the array itself is wrong
        bench.write(GOOD, record, GOOD)
        for policy in ("error", "skip"):
            expect_error(lambda policy=policy: bench.open(policy), "data.json record 1", problem)


def expect_left_out_later(bench: Bench, problem: str, measured: bool = True) -> None:
    """The image of record 1 of three is an error when the sample is read, or is counted and left out."""
    strict, lenient = bench.open("error"), bench.open("skip")
    start = "data.json record 1: image '"
    expect_error(lambda: strict[1], start, problem)
    row = within_time(lambda: lenient[1])
    [skip] = row.skipped
    assert row.examples == () and skip.index == 1 and not skip.too_long
    assert re.search(f"^{bench.folder}/{start}.*{problem}", skip.reason, re.DOTALL)
    good: list[Row] = [lenient[0], lenient[2]]
    assert [len(row.examples) for row in good] == [1, 1] and not any(row.skipped for row in good)
    if measured:
        assert within_time(lambda: lenient.measure(0))[1] > 0


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_image(bench: Bench, name: str) -> None:
    make, problem = BAD_IMAGES[name]
    bench.write(shown(), shown(image=make(bench.folder)), GOOD)
    expect_left_out_later(bench, problem)
    strict = bench.open("error")
    try:
        tokens, visual = within_time(lambda: strict.measure(1))
    except UserError as error:
        assert "data.json record 1: image '" in str(error)
    else:  # damage behind the header
        assert tokens > visual > 0


def test_image_without_permission(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The superuser may read everything, so that the system's answer is imitated."""
    noise_picture(9, 9).save(bench.folder / "secret.png")
    real = open

    def refuse(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path).endswith("secret.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", refuse)
    bench.write(shown(), shown(image="secret.png"), GOOD)
    expect_left_out_later(bench, "secret.png' cannot be read: Permission denied")


@pytest.mark.parametrize("name", SERVERS)
def test_server(bench: Bench, server: FaultyServer, name: str) -> None:
    if name in NEVER:
        bench.images = replace(IMAGES, timeout=0.2)
    bench.write(shown(), shown(image=f"{server.address}/{name}"), GOOD)
    expect_left_out_later(bench, SERVERS[name], measured=False)


def test_server_of_the_local_network(bench: Bench, server: FaultyServer) -> None:
    bench.images = ImageSettings(offline=False)
    bench.write(shown(), shown(image=f"{server.address}/picture.png"), GOOD)
    expect_left_out_later(bench, "127.0.0.1 belongs to the local network; set allow_local_network", measured=False)


def test_offline(bench: Bench, server: FaultyServer) -> None:
    bench.images = ImageSettings(allow_local_network=True)
    bench.write(shown(), shown(image=f"{server.address}/picture.png"), GOOD)
    expect_left_out_later(bench, "is not in the cache, and PADDLEMIX_OFFLINE=1 forbids", measured=False)


@pytest.mark.parametrize("name", FILES)
def test_file(bench: Bench, name: str) -> None:
    text, problem = FILES[name]
    (bench.folder / "data.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    for policy in ("error", "skip"):
        expect_error(lambda policy=policy: bench.open(policy), "data.json", problem)


@pytest.mark.parametrize("name", BROKEN_LINES)
def test_line(bench: Bench, name: str) -> None:
    line, problem = BROKEN_LINES[name]
    (bench.folder / "data.jsonl").write_text(lines(GOOD, line, GOOD))
    expect_left_out_at_once(bench, "data.jsonl", problem)


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_file_that_is_none(bench: Bench, policy: str) -> None:
    (bench.folder / "folder.json").mkdir()
    os.mkfifo(bench.folder / "pipe.json")
    for name, problem in {
        "absent.json": "does not exist",
        "folder.json": "is a folder",
        "pipe.json": "is no regular file",
        "data.json/a.json": "does not exist",
    }.items():
        bench.write(GOOD)
        expect_error(lambda name=name: bench.open(policy, name), name, problem)


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_file_that_changes(bench: Bench, policy: str) -> None:
    bench.write(GOOD, GOOD)
    dataset = bench.open(policy)
    bench.write(GOOD)
    if policy == "error":
        expect_error(lambda: dataset[1], "data.json", "changed during the run")
    else:
        [skip] = within_time(lambda: dataset[1]).skipped
        assert "changed during the run" in skip.reason


DATA_SERVERS = {
    **{name: SERVERS[name] for name in ("missing", "silence", "dripping-body", "loop", "to-file", "short")},
    "endless": r"is larger than 40000 bytes \(max_bytes=40000\)",
    "html": "begins like a web page",
    "picture": "is not JSON|is not UTF-8",
}


@pytest.mark.parametrize("name", DATA_SERVERS)
@pytest.mark.usefixtures("bench")
def test_data_file_on_a_server(server: FaultyServer, name: str) -> None:
    timeout = 0.2 if name in NEVER else 300
    settings = RemoteSettings(timeout=timeout, retries=0, max_bytes=MAX_BYTES, allow_local_network=True, offline=False)
    url = f"{server.address}/{name}"
    expect_error(lambda: open_records(url, remote=settings), url, DATA_SERVERS[name])
