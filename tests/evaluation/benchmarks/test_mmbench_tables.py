"""Tables with tabs, as pandas reads them for the official scripts: empty cells, options, pictures stored once."""

from __future__ import annotations

from pathlib import Path

import pytest

from paddlemix.errors import UserError
from paddlemix.evaluation.benchmarks.benchmark import LETTER, BenchmarkData, Request
from paddlemix.evaluation.benchmarks.mmbench_tables import CHINESE_CULTURE, ENGLISH, read_mmbench, read_table
from tests.evaluation.benchmarks.tiny_benchmarks import mmbench_rows, write_table

NAME = "table.tsv"


def read(folder: Path, protocol: str = "llava") -> BenchmarkData:
    return read_mmbench(Request(folder=folder, protocol=protocol), (NAME,), ENGLISH)


def test_both_kinds_of_tables_are_the_same_benchmark(tmp_path: Path) -> None:
    write_table(tmp_path / "old" / NAME, mmbench_rows(True, False, options=4))
    write_table(tmp_path / "new" / NAME, mmbench_rows(True, True, options=4))
    old, new = read(tmp_path / "old"), read(tmp_path / "new")
    assert old.questions == new.questions and old.pictures == new.pictures
    assert [len(data.questions) for data in (old, new)] == [8, 8] and len(old.pictures) == 2
    assert all("image" not in question.record for question in old.questions)
    assert all(name.endswith(".png") for name in old.pictures)


def test_cells_that_are_empty(tmp_path: Path) -> None:
    """The options end at the first empty one; a hint "nan" is none; quoted cells hold tabs, quotes and line ends."""
    row = mmbench_rows(True, False)[0] | {"hint": "None", "question": 'a "b"\tc\nd', "A": "N/A?", "B": "nan", "C": "x"}
    write_table(tmp_path / NAME, [row])
    data = read(tmp_path)
    assert data.questions[0].text == f'a "b"\tc\nd\nA. N/A?\n{LETTER}'
    assert data.questions[0].record["C"] == "x" and "B" not in data.questions[0].record
    # lmms-eval takes every option that has a value
    assert "A. N/A?\nC. x" in read(tmp_path, "lmms-eval").questions[0].text


def test_ccbench_is_asked_without_its_hint(tmp_path: Path) -> None:
    write_table(tmp_path / NAME, [mmbench_rows(True, False)[1]])
    request = Request(folder=tmp_path, protocol="lmms-eval")
    text = read_mmbench(request, (NAME,), CHINESE_CULTURE).questions[0].text
    assert text.startswith("Which 1? There are several options:\nA. option0")


def test_a_table_without_answers_is_scored_elsewhere(tmp_path: Path) -> None:
    write_table(tmp_path / NAME, mmbench_rows(False, False))
    assert not read(tmp_path).has_references
    rows = mmbench_rows(True, False)
    write_table(tmp_path / NAME, [{**rows[0], "answer": ""}, rows[1]])
    assert not read(tmp_path).has_references


def test_what_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_text("index\tquestion\n1\tx\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"has no column A, B, image \(columns: index, question\)"):
        read_table(path)
    write_table(path, [mmbench_rows(True, False)[0] | {"index": "x"}])
    with pytest.raises(UserError, match="row 1 has no index, question or image"):
        read_table(path)
    write_table(path, [mmbench_rows(True, False)[0] | {"image": "7"}])
    with pytest.raises(UserError, match="image '7' is neither a picture nor the index of a row with one"):
        read(tmp_path)
    path.write_bytes("index\tquestion\tA\tB\timage\n1\tä".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8"):
        read_table(path)
