"""VQA tables: CSV files with an image, a question and an answer in each row, and the images that they name.

Knows nothing of conversations; `tools/convert_data.py` makes records of the rows.
"""

from __future__ import annotations

import csv
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TextIO

from paddlemix.errors import MissingFileError, UserError, cut, did_you_mean
from paddlemix.table_files import opened_table

_DELIMITERS = ",;\t|"
_MAX_FIELD = 16 * 1024**2  # characters; more is a quotation mark that is never closed
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_LONGEST_PATH = 4096  # characters
_SHOWN = 80  # characters of a name that an error repeats
_LAST_NUMBER = re.compile(r"(\d+)$")
_WHOLE_FLOAT = re.compile(r"(\d+)\.0")  # how programs write an id in a column with an empty cell


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns that count; of each, the first that the table has is used."""

    image: Sequence[str] = ("image", "image_id", "image_path", "image_file")
    question: Sequence[str] = ("question",)
    answer: Sequence[str] = ("answer",)


@dataclass(frozen=True)
class TableRow:
    """One row.

    Args:
        line: where it begins, 1-based; the header is line 1.
        image, question, answer: the cells, outer white space cut off; none is empty.
    """

    line: int
    image: str
    question: str
    answer: str


def read_table(path: Path, columns: Columns) -> Iterator[tuple[int, TableRow | UserError]]:
    """Rows of a CSV file, its delimiter (comma, semicolon, tab or bar) found in the header; blank lines are skipped.

    Args:
        path: UTF-8, with or without a byte order mark, its first line the names of the columns.

    Yields:
        The line where a row begins, and the row or what is wrong with it.

    Raises:
        MissingFileError: the file does not exist or cannot be read.
        UserError: it is not UTF-8, has no header or not the columns, or its quotation marks are broken.
    """
    with opened_table(path, _MAX_FIELD) as file:
        try:
            yield from _rows(file, columns)
        except UserError as error:
            raise UserError(f"table '{path}': {error}") from error


def _rows(file: TextIO, columns: Columns) -> Iterator[tuple[int, TableRow | UserError]]:
    first = file.readline()
    file.seek(0)
    reader = csv.reader(file, delimiter=_delimiter(first), strict=True)
    header = [name.strip() for name in next(reader, [])]
    if not any(header):
        raise UserError("it is empty; the first line names the columns")
    places = {key: _place(header, key, getattr(columns, key)) for key in ("image", "question", "answer")}
    line = reader.line_num + 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise csv.Error(f"line {line}: {error}") from error
        if cells is None:
            return
        # `csv` returns an empty list for a blank line
        if cells:
            yield line, _row(line, cells, len(header), places)
        line = reader.line_num + 1


def _delimiter(header: str) -> str:
    try:
        return csv.Sniffer().sniff(header, _DELIMITERS).delimiter
    except csv.Error:  # one column, or names that tell nothing
        return max(_DELIMITERS, key=header.count)


def _place(header: Sequence[str], key: str, choices: Sequence[str]) -> int:
    name = next((choice for choice in choices if choice in header), None)
    if name is None:
        raise UserError(
            f"no column '{choices[0]}' (columns: {', '.join(header)}){did_you_mean(choices[0], header)}; "
            f"name it with --{key}-column"
        )
    if header.count(name) > 1:
        raise UserError(f"the column '{name}' appears {header.count(name)} times; rename all but one")
    return header.index(name)


def _row(line: int, cells: Sequence[str], width: int, places: dict[str, int]) -> TableRow | UserError:
    # a cell with an unquoted delimiter: shifted columns would pass for an answer
    if len(cells) != width:
        return UserError(f"{len(cells)} cells, the header has {width}; quote a cell that holds the delimiter")
    values = {key: cells[place].strip() for key, place in places.items()}
    empty = [key for key, value in values.items() if not value]
    if empty:
        return UserError(f"the {' and the '.join(empty)} {'is' if len(empty) == 1 else 'are'} empty")
    return TableRow(line, **values)


class ImageFinder:
    """Finds the images that tables name by path, file name or number.

    Args:
        root: folder that they are in, its subfolders too; None where names are used as they are.

    Raises:
        MissingFileError: the folder does not exist.
    """

    def __init__(self, root: Path | None) -> None:
        if root is not None and not root.is_dir():
            raise MissingFileError(f"--image-root '{root}' is not a folder (looked from {Path.cwd()})")
        self._root = root

    def find(self, name: str) -> str:
        """The image's path below the root, with `/`; URLs and absolute paths stay as they are.

        Args:
            name: path below the root, file name with or without extension, or a number such as 104406, which
                COCO_val2014_000000104406.jpg has at its end.

        Raises:
            UserError: no image has this name, or more than one.
        """
        if name.startswith(("http://", "https://", "data:")):
            return name
        if self._root is None:
            if not name.lower().endswith(_EXTENSIONS):
                raise UserError(
                    f"the image '{cut(name, _SHOWN)}' has no file extension; give --image-root to look it up"
                )
            return name
        if len(name) > _LONGEST_PATH:
            raise UserError(
                f"the image '{cut(name, _SHOWN)}' is too long for a path; a picture in base64 begins with "
                "data:image/jpeg;base64, or is saved as a file"
            )
        if os.path.isfile(self._root / name):  # False also where the name can be no path
            return name
        # name                                  -> is looked up as
        # a path below the root                 -> itself
        # "104406.0", a table's float           -> 104406
        # file name with or without extension   -> the one file of this name
        # digits                                -> the one file whose name ends with this number
        whole = _WHOLE_FLOAT.fullmatch(name)
        key = whole[1] if whole else name
        found = self._names.get(key) or (self._numbers.get(int(key)) if key.isdecimal() else None)
        if not found:
            raise UserError(f"no image '{cut(name, _SHOWN)}' in {self._root}")
        if len(found) > 1:
            raise UserError(f"'{name}' may be {found[0]} or {found[1]} in {self._root}; give the path")
        return found[0]

    @cached_property
    def _files(self) -> list[str]:
        assert self._root is not None
        found = []
        for folder, _, names in os.walk(self._root):
            below = Path(folder).relative_to(self._root)
            found += [(below / name).as_posix() for name in names if name.lower().endswith(_EXTENSIONS)]
        # the order of `os.walk` differs between machines, and with it the files that an error names
        return sorted(found)

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        """File name, and path, without extension -> paths."""
        names: dict[str, list[str]] = defaultdict(list)
        for path in self._files:
            stem = os.path.splitext(path)[0]
            # a set: in the root itself a path and its name are the same
            for name in {stem, os.path.basename(stem), os.path.basename(path)}:
                names[name].append(path)
        return dict(names)

    @cached_property
    def _numbers(self) -> dict[int, list[str]]:
        """The number that a file name ends with -> paths."""
        numbers: dict[int, list[str]] = defaultdict(list)
        for path in self._files:
            match = _LAST_NUMBER.search(os.path.splitext(path)[0])
            if match is not None:
                numbers[int(match[1])].append(path)
        return dict(numbers)
