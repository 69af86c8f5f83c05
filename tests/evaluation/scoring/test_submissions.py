"""Files for servers: the right rows, "" where there is no answer, cells that a sheet can hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from paddlemix.errors import UserError
from paddlemix.evaluation.scoring.submissions import (
    gqa_submission,
    mmbench_submission,
    mmvet_submission,
    seed_submission,
    vizwiz_submission,
    vqav2_submission,
    write_xlsx,
)


def test_vqav2_and_vizwiz() -> None:
    assert vqav2_submission([1, 2], {1: "The Cat."}) == [
        {"question_id": 1, "answer": "cat"},
        {"question_id": 2, "answer": ""},
    ]
    assert vizwiz_submission([("a", "a.jpg")], {"a": "Two!"}) == [{"image": "a.jpg", "answer": "2"}]
    with pytest.raises(UserError, match="question 'b' has no answer"):
        vizwiz_submission([("b", "b.jpg")], {})


def test_gqa_seed_and_mmvet() -> None:
    assert gqa_submission({"g1": "Red."}) == [{"questionId": "g1", "prediction": "red"}]
    lines = seed_submission(["7", "v1"], {7: "A", "v1": "B"})
    assert lines == [{"question_id": "7", "prediction": "A"}, {"question_id": "v1", "prediction": "B"}]
    with pytest.raises(UserError, match="question '8' has no answer"):
        seed_submission(["8"], {7: "A"})
    assert mmvet_submission({3: "x"}) == {"v1_3": "x"}


COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "comment", "split")


def test_mmbench_columns() -> None:
    row = {name: name for name in COLUMNS} | {"index": 5, "D": float("nan")}
    header, cells = mmbench_submission(COLUMNS, [row, {**row, "index": 6}], {5: "B"})
    assert header == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert cells[0] == [5, "question", "A", "B", "C", None, "B", "answer", "split"] and cells[1][6] is None


def test_a_sheet_holds_every_answer(tmp_path: Path) -> None:
    import openpyxl

    path = tmp_path / "up.xlsx"
    write_xlsx(path, ["index", "prediction"], [[1, "=1+1"], [2, "a\x0bb\ud800"], [3, None], [4, "两\nlines"]])
    sheet = openpyxl.load_workbook(path).active
    assert [[cell.value for cell in row] for row in sheet.iter_rows()] == [
        ["index", "prediction"],
        [1, "=1+1"],
        [2, "a_x000B_b_xD800_"],
        [3, None],
        [4, "两\nlines"],
    ]
    assert sheet["B2"].data_type == "s"
