"""Decoding of single records, and what kind of file holds them; whole files are tested in `test_record_file.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from paddlemix.datasets.records.file_kind import Layout, recognise
from paddlemix.datasets.records.json_values import DECODER, json_kind, not_an_object, undecodable
from paddlemix.datasets.records.syntax_errors import ArrayReader
from paddlemix.errors import UserError


@contextmanager
def opened(path: Path, content: bytes) -> Iterator[int]:
    path.write_bytes(content)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def test_names_of_values() -> None:
    values = [{}, [], "a", True, None, 1, 1.5]
    assert list(map(json_kind, values)) == ["object", "array", "text", "boolean", "null", "number", "number"]
    assert not_an_object([1]) == "a JSON array, expected an object with 'conversations'"


def test_what_is_not_json() -> None:
    with pytest.raises(UserError, match="NaN is not JSON"):
        DECODER.decode('{"a": NaN}')
    assert undecodable(RecursionError("maximum")) == "lists or objects are nested too deeply"


@pytest.mark.parametrize(
    ("content", "layout"),
    [
        (b' [{"a": 1}]', Layout(True, 0, 2)),
        (b'\xef\xbb\xbf{"a": 1}', Layout(False, 3, 3)),
    ],
)
def test_kinds_of_files(tmp_path: Path, content: bytes, layout: Layout) -> None:
    with opened(tmp_path / "a", content) as descriptor:
        assert recognise(descriptor, "a") == layout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b" \n", "holds no record: it is empty"),
        (b"PK\x03\x04", "is a zip archive"),
        (b" <html>", "begins like a web page or XML"),
        (b'"text"', "holds a JSON text, expected an array"),
        (b"a,b", "is not JSON: it begins with 'a,b'"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, content: bytes, message: str) -> None:
    with opened(tmp_path / "a", content) as descriptor, pytest.raises(UserError, match=f"data file 'a' {message}"):
        recognise(descriptor, "a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1},\n {"b" 2}]', "line 2, column 7: Expecting ':' delimiter"),
        (b'[{"a": 1} {}]', "line 1, column 11: Expecting ',' delimiter"),
        (b'[{"a": 1}, 5]', "record 1: a JSON number, expected an object"),
        (b'[{"a": 1}] x', "line 1, column 12: Extra data"),
        (b'[{"a": "\xff"}]', "is not UTF-8 .byte 8."),
    ],
)
def test_where_an_array_is_broken(tmp_path: Path, content: bytes, message: str) -> None:
    with opened(tmp_path / "a", content) as descriptor, pytest.raises(UserError, match=message):
        raise ArrayReader(descriptor, "a", 0).explain(1, 0)
