"""The good records of checked files written down unchanged, in one new data file.

Knows the outcome of a check, not how it came about.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from paddlemix.cache import replacing
from paddlemix.datasets.checking.check import CheckReport
from paddlemix.datasets.checking.record_checker import DataFile
from paddlemix.datasets.records.record_file import open_records
from paddlemix.errors import UserError
from paddlemix.outputs import Needed, Output, check_output


def check_fix_target(target: Path, files: Sequence[DataFile]) -> None:
    """Whether the good records of these files can go into one new file.

    Raises:
        UserError: the target is one of the files, its folder is missing, or the files are not read alike.
    """
    if not target.parent.is_dir():
        raise UserError(f"--fix {target}: the folder {target.parent} does not exist")
    paths = [file.path for file in files]
    checked = [Needed("one of the files that are checked", Path(path), "file") for path in paths]
    check_output(Output("--fix", target, "file"), checked)
    # One output cannot hold a file's records twice, once for each way to read them.
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise UserError(f"--fix: {twice} is read in two ways (template or image_root); fix it by itself")
    for key in ("image_root", "form"):
        values = list(dict.fromkeys(str(getattr(file, key)) for file in files))
        if len(values) > 1:
            raise UserError(
                f"--fix writes one file, but the data files differ in {key if key != 'form' else 'name'} "
                f"({', '.join(values)}); fix them one by one"
            )


def write_good_records(report: CheckReport, target: Path, limit: int | None = None) -> int:
    """Writes every record that is not bad, in the order of the data; the file appears whole or not at all.

    Args:
        report: of the check.
        target: a JSON array; JSON Lines where it ends in ".jsonl".
        limit: first records of each file that were checked; None for all.

    Returns:
        How many records were written.

    Raises:
        UserError: a whole file was unreadable, no record is good, or the target cannot be written.
    """
    # leaving out a whole file because a bracket is missing would be no repair
    if report.unreadable:
        raise UserError("--fix: a data file cannot be read at all (see the problems); repair or leave it out first")
    if report.num_bad == report.records:
        raise UserError(f"--fix: none of the {report.records} records is good, so nothing was written")
    lines, count = target.suffix == ".jsonl", 0
    # the bytes around records: JSON Lines, or an array with one record on a line
    before, between, after = ("", "\n", "\n") if lines else ("[\n", ",\n", "\n]\n")
    with replacing(target) as temporary, open(temporary, "wb") as file:
        file.write(before.encode())
        for record in _good_records(report, limit):
            file.write((between.encode() if count else b"") + _encoded(record))
            count += 1
        file.write(after.encode())
    return count


def _good_records(report: CheckReport, limit: int | None) -> Iterator[dict[str, Any]]:
    for number, file in enumerate(report.files):
        records = open_records(file.path, file.form)
        bad = report.bad.get(number, set())
        for row in range(len(records) if limit is None else min(len(records), limit)):
            if row not in bad:
                yield records[row]


def _encoded(record: dict[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a character, in a key that nobody reads: only an escape can write it
        return json.dumps(record).encode()
