"""A table that cannot be opened is one error that names it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from paddlemix.errors import MissingFileError, UserError
from paddlemix.table_files import opened_table


def read(path: Path) -> list[list[str]]:
    with opened_table(path, longest_cell=100) as file:
        return list(csv.reader(file))


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(b'\xef\xbb\xbfimage,question\r\na.png,"a\nb"\r\n')
    assert read(path) == [["image", "question"], ["a.png", "a\nb"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"image\n\xff\n", "is not UTF-8"),
        (b'image\n"' + b"x" * 200, "is a quotation mark missing"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n", "git-lfs"),
    ],
)
def test_a_broken_table_is_one_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["missing.csv", "."])
def test_a_table_that_is_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(MissingFileError, match="does not exist|cannot be read"):
        read(tmp_path / name)
