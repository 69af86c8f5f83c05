"""convert-data: tables and records of every form to LLaVA's JSON, and every fault named with its line."""

from __future__ import annotations

import errno
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from paddlemix.datasets.forms.parse import parse_record
from paddlemix.tools.common.command import run_command
from paddlemix.tools.convert_data import main

COCO = "COCO_val2014_000000104406.jpg"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for name in (COCO, "val/COCO_val2014_000000000007.jpg", "a b.PNG", "twice.jpg", "val/twice.png", "notes.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def convert(tmp_path: Path, content: str | bytes, *more: str, name: str = "table.csv") -> tuple[int, Any]:
    """Status, and what was written; None where nothing was."""
    source, output = tmp_path / name, tmp_path / "out.json"
    source.write_bytes(content if isinstance(content, bytes) else content.encode())
    status = run_command(main, [str(source), "--output", str(output), *more])
    return status, json.loads(output.read_text(encoding="utf-8")) if output.exists() else None


def turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def test_a_table(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = (
        'row,image_id,question,question_id,answer\n0,104406,Is there railing?,1,yes\n\n1,7.0,"A ""b"", c?\nd",2,是\n'
    )
    status, records = convert(tmp_path, table, "--image-root", str(images), "--suffix", r"\nOne word.")
    assert status == 0
    assert records == [
        {"id": "0", "image": COCO, "conversations": turn("<image>\nIs there railing?\nOne word.", "yes")},
        {
            "id": "1",
            "image": "val/COCO_val2014_000000000007.jpg",
            "conversations": turn('<image>\nA "b", c?\nd\nOne word.', "是"),
        },
    ]
    assert capsys.readouterr().out == f"wrote 2 records of 2 images in {tmp_path / 'out.json'}\n"
    for record in records:
        assert len(parse_record(record, "out.json").images) == 1


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_delimiters_and_marks(tmp_path: Path, delimiter: str, mark: str, end: str) -> None:
    rows = [["image", "question", "answer"], ["a.jpg", '"x;y, z|\tw ""q"""', "1"]]
    text = mark + end.join(delimiter.join(row) for row in rows) + end
    _, records = convert(tmp_path, text)
    assert records[0]["conversations"] == turn('<image>\nx;y, z|\tw "q"', "1")


def test_columns_of_other_names(tmp_path: Path) -> None:
    columns = ("--image-column", "file", "--question-column", "q", "--answer-column", "a")
    _, records = convert(tmp_path, "a,q,file,answer\n1,Q,https://x.org/1,2\n", *columns)
    assert records == [{"id": "0", "image": "https://x.org/1", "conversations": turn("<image>\nQ", "1")}]


def test_rows_of_an_image_together(tmp_path: Path, images: Path) -> None:
    table = "image,question,answer\n7,One?,1\n104406,Two?,2\nCOCO_val2014_000000000007,Three?,3\n"
    _, records = convert(tmp_path, table, "--image-root", str(images), "--group-by-image")
    assert [record["conversations"] for record in records] == [
        turn("<image>\nOne?", "1") + turn("Three?", "3"),
        turn("<image>\nTwo?", "2"),
    ]


@pytest.mark.parametrize("name", ["a b.PNG", "a b", "val/twice.png", "val/twice"])
def test_names_of_images(tmp_path: Path, images: Path, name: str) -> None:
    status, _ = convert(tmp_path, f"image,question,answer\n{name},Q,A\n", "--image-root", str(images))
    assert status == 0


ROOT = ("--image-root", "images")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("7,Q", "line 2: 2 cells, the header has 3; quote a cell that holds the delimiter"),
        ("7,Q,A\n7,a, b,A", "line 3: 4 cells, the header has 3"),
        ('7,"Q\nq",A\n7,Q,', "line 4: the answer is empty"),
        ("7, ,", "line 2: the question and the answer are empty"),
        ("7,What is <image>?,A", "line 2: the question contains <image>"),
        ("8,Q,A", "line 2: no image '8' in images"),
        ("notes,Q,A", "line 2: no image 'notes' in images"),
        (
            "0123456789" * 1000 + ",Q,A",
            f"line 2: the image '{'0123456789' * 8}... (10,000 characters)' is too long for",
        ),
        ("0123456789" * 30 + "x,Q,A", f"line 2: no image '{'0123456789' * 8}... (301 characters)' in images"),
        ("twice,Q,A", "line 2: 'twice' may be twice.jpg or val/twice.png in images; give the path"),
    ],
)
def test_bad_rows_are_named(
    tmp_path: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rows: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    table = f"image,question,answer\n{rows}\n7,Q,A\n"
    status, records = convert(tmp_path, table, *ROOT)
    assert (status, records) == (2, None)
    shown = capsys.readouterr()
    assert f"table.csv {message}" in shown.err and shown.out == ""
    assert shown.err.endswith("error: 1 cannot be converted, so nothing was written; fix them or give --skip-bad\n")
    status, records = convert(tmp_path, table, *ROOT, "--skip-bad")
    assert status == 0 and len(records) == 1 + rows.count("A\n7")
    assert records[-1]["conversations"] == turn("<image>\nQ", "A")
    assert "skipped 1 that cannot be converted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; the first line names the columns"),
        ("image,q,answer\n", "no column 'question' (columns: image, q, answer); name it with --question-column"),
        ("image,question,answers\n", "did you mean 'answers'?; name it with --answer-column"),
        ("image,question,answer,answer\n", "the column 'answer' appears 2 times"),
        ('image,question,answer\na.jpg,"Q,A\n', "line 2: unexpected end of data; is a quotation mark missing?"),
        (b"image,question,answer\na.jpg,\xe9,A\n", "is not UTF-8"),
        ("image,question,answer\n", "no record is left for"),
    ],
)
def test_table_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | bytes, message: str
) -> None:
    assert convert(tmp_path, content) == (2, None)
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.csv", "--output", "o.json"], "table 'no.csv' does not exist (looked in"),
        (["no.jsonl", "--output", "o.json"], "no.jsonl' does not exist"),
        (["t.xlsx", "--output", "o.json"], "'t.xlsx' is not of a known kind; give a .csv, .tsv, .json or .jsonl file"),
        (["t.csv", "--output", "o"], "--output 'o' must end in .json or .jsonl"),
        (["o.json", "--output", "o.json"], "--output 'o.json' is the input"),
        (["t.csv", "--output", "o.json", "--split", "1"], "--split 1.0 is not between 0 and 1"),
        (["t.csv", "--output", "o.json", "--image-root", "no"], "--image-root 'no' is not a folder"),
        (["t.csv", "--output", "o.json", "--form", "coco_vqa"], "--form is for records, not for tables"),
        (["t.json", "--output", "o.json", "--group-by-image"], "--group-by-image is for tables, not for records"),
        (["t.json", "--output", "o.json", "--form", "coco"], "--form 'coco' is not one of chatml_dataset"),
        (["t.csv", "--output", "no/o.json"], "no/o.json cannot be written"),
    ],
)
def test_arguments_that_do_not_fit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("image,question,answer\na.jpg,Q,A\n")
    assert run_command(main, arguments) == 2
    assert message in capsys.readouterr().err


BOXED = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image><image>Find the <ref-object>"},
        {"role": "assistant", "content": "At <bbox>, <image>"},
    ],
    "images": ["a.jpg", {"url": "https://x.org/b.jpg"}],
    "objects": {"ref": ["dog"], "bbox": [[0.1, 0.2, 0.3, 0.4]], "bbox_type": "norm1", "image_id": [1]},
}
FORMS: list[dict[str, Any]] = [
    {"conversations": [["<image>\nQ", "A"]], "image": "a.jpg", "id": "x"},
    {"query": "Q", "response": "A", "history": [["P", "B"]], "images": ["a.jpg", "b.jpg"]},
    {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
    BOXED,
]


@pytest.mark.parametrize("lines", [False, True])
def test_records_of_any_form_mean_the_same_afterwards(tmp_path: Path, lines: bool) -> None:
    content = "\n".join(map(json.dumps, FORMS)) if lines else json.dumps(FORMS)
    status, records = convert(tmp_path, content, name="data.jsonl" if lines else "data.json")
    assert status == 0 and len(records) == len(FORMS)
    assert [record["id"] for record in records] == ["x", "1", "2", "3"]
    for before, after in zip(FORMS, records, strict=True):
        assert {turn["from"] for turn in after["conversations"]} <= {"system", "human", "gpt"}
        found, wanted = parse_record(after, "x"), parse_record(before, "x")
        assert [message.text for message in found.messages] == [message.text for message in wanted.messages]
        assert found.images == wanted.images
        assert [m.content for m in found.messages if m.role == "assistant"] == [
            m.content for m in wanted.messages if m.role == "assistant"
        ]


def test_records_of_a_named_form(tmp_path: Path) -> None:
    content = json.dumps([{"image": "a.jpg", "question": "Q", "answer": ["A", "B", "B"]}])
    _, records = convert(tmp_path, content, "--form", "coco_vqa", name="data.json")
    assert records[0]["conversations"] == turn("<image>\nQ", "B")


def test_bad_records_are_named(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "Write <image>"}]}
    bad = [
        {"conversations": [["Q", ""]]},
        {"messages": [parts, {"role": "assistant", "content": "A"}]},
        {"conversations": [["<image>", "A"]], "image": "absent.jpg"},
    ]
    arguments = ("--image-root", str(images))
    assert convert(tmp_path, json.dumps([*bad, FORMS[2]]), *arguments, name="data.json") == (2, None)
    shown = capsys.readouterr().err
    assert "data.json record 0: turn 2: the answer is empty" in shown
    assert "data.json record 1: a text of the user holds <image> as words" in shown
    assert "data.json record 2: no image 'absent.jpg' in" in shown
    assert len(re.findall(r"record \d", shown)) == 3
    _, records = convert(tmp_path, json.dumps([*bad, FORMS[2]]), *arguments, "--skip-bad", name="data.json")
    assert [record["id"] for record in records] == ["3"]


def test_split_keeps_an_image_on_one_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f"{number % 100}.jpg,Q{number},A\n" for number in range(400))
    _, train = convert(tmp_path, "image,question,answer\n" + rows, "--split", "0.2")
    held = json.loads((tmp_path / "out_eval.json").read_text())
    assert len(train) + len(held) == 400 and 40 < len(held) < 120
    assert not {record["image"] for record in train} & {record["image"] for record in held}
    assert f"wrote {len(held)} records of {len(held) // 4} images in" in capsys.readouterr().out
    assert convert(tmp_path, "image,question,answer\n" + rows)[0] == 2  # nothing is replaced without a word
    _, again = convert(tmp_path, "image,question,answer\n" + rows, "--split", "0.2", "--overwrite")
    _, other = convert(tmp_path, "image,question,answer\n" + rows, "--split", "0.2", "--seed", "1", "--overwrite")
    assert again == train != other


def test_a_split_that_leaves_a_file_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(tmp_path, "image,question,answer\na.jpg,Q,A\n", "--split", "0.001") == (2, None)
    assert "out_eval.json, so nothing was written; see --split" in capsys.readouterr().err


def test_lines(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,question,answer\na.jpg,Q,A\nb.jpg,Q,A\n")
    assert run_command(main, [str(tmp_path / "t.csv"), "--output", str(tmp_path / "o.jsonl")]) == 0
    lines = (tmp_path / "o.jsonl").read_text().splitlines()
    assert [json.loads(line)["image"] for line in lines] == ["a.jpg", "b.jpg"]


def test_the_settings_of_a_model_are_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").write_text("image,question,answer\na.jpg,Q,A\n")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    arguments = [str(tmp_path / "t.csv"), "--output", str(tmp_path / "config.json"), "--overwrite"]
    assert run_command(main, arguments) == 2
    assert "config.json' exists in the folder of a model or adapter" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_disk_that_fills_up_leaves_neither_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The larger file, that for training, does not fit: what fits must not be in place either."""
    content = "image,question,answer\n" + "".join(f"{number}.jpg,Q,A\n" for number in range(40))
    assert convert(tmp_path, content, "--split", "0.2")[0] == 0
    places = [tmp_path / name for name in ("out.json", "out_eval.json")]
    before, opened = [place.read_bytes() for place in places], Path.open
    assert len(before[0]) > len(before[1])

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() + len(data) > sum(map(len, before)) // 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data) or 0

    def on_a_full_disk(path: Path, mode: str = "r", *more: Any, **named: Any) -> Any:
        if mode != "w":
            return opened(path, mode, *more, **named)
        return io.TextIOWrapper(io.BufferedWriter(Full(path, "w")), encoding="utf-8")

    monkeypatch.setattr(Path, "open", on_a_full_disk)
    for kept in (before, [None, None]):
        assert convert(tmp_path, content, "--split", "0.2", "--seed", "1", "--overwrite")[0] != 0
        assert "out.json cannot be written: No space left on device" in capsys.readouterr().err
        assert [place.read_bytes() if place.exists() else None for place in places] == kept
        for place in places:
            place.unlink(missing_ok=True)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
